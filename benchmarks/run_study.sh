#!/usr/bin/env bash
# Every way to train side by side, on all GPUs of one machine:
#
#     benchmarks/run_study.sh try DIR         a minute of the encoder's methods on one layer, to see that they run there
#     benchmarks/run_study.sh encoder DIR     reads benchmarks/.study_data/encoder.npz
#     benchmarks/run_study.sh decoder DIR     reads the other three files there
#
# DIR/PHASE.jsonl gets every training as its job ends, and DIR/PHASE.log what is printed. They are written nowhere else, so DIR must be the
# directory that is brought back from the machine. A part takes MINUTES and one more at most; 4 H200 are expected to end it in the default time. What
# matters most comes first, of SEEDS seeds (five; the decoder's and the smaller phases' three), what benchmarks/results holds already is not run again (`selection_tables.py --keep DIR …` puts it there),
# so that a part that was cut short goes on by the same command; SCRATCH names a directory of the machine that keeps probes between calls.
set -u
part=$1 out=$2
minutes=${MINUTES:-8.2}
seeds=${SEEDS:-5}
scratch=${SCRATCH:-$(mktemp -d)}
if [ -z "${SCRATCH:-}" ]; then trap 'rm -rf "$scratch"' EXIT; fi
mkdir -p "$scratch"
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$out"

left() {  # minutes until $1 minutes after the start, and at least a half
    awk -v end="$1" -v now="$SECONDS" 'BEGIN { left = end - now / 60; print (left > 0.5 ? left : 0.5) }'
}

study() {  # PHASE, UNTIL, NAME of its scratch, options
    python3 benchmarks/selection_study.py --phase "$1" --go_on --minutes "$(left "$2")" --output_dir "$out" \
        --scratch "$scratch/$3" "${@:4}" >> "$out/$1.log" 2>&1
}

few=() many=()
for task in movie amazon nyt tweets bbc movie_score capitals; do few+=("$task, 200 examples"); done
for task in movie movie_score capitals; do many+=("$task, 10000 examples"); done

case $part in
try)
    study proof 2.5 proof --seeds 3 --scale 0.02 --tasks movie &
    study noise 2.5 noise --seeds 3 --scale 0.02 --workers 1 --tasks "bbc, 30% flipped"
    study small_data 2.5 few --seeds 3 --scale 0.02 --workers 1 --tasks "capitals, 10000 examples"
    wait
    grep -h -A 12 Traceback "$out"/*.log
    ;;
encoder)  # the small phases beside the large one, so that no GPU waits
    study proof "$minutes" proof --seeds "$seeds" &
    study small_data "$minutes" few --seeds "$seeds" --workers 1 --tasks "${few[@]}" \
        --methods "weights 0.12%" "LoRA 4" full "random 0.12%" "biases, norms" "equal cost"
    study noise "$minutes" noise --seeds 3 --workers 1
    study depth "$minutes" depth --seeds 3 --workers 1
    study small_data "$minutes" many --seeds 3 --workers 1 --tasks "${many[@]}" \
        --methods "weights 0.12%" "LoRA 4" full "random 0.12%" "biases, norms" "weights 0.5%" "weights 2%"
    ;;
decoder)  # two trainings of the whole model on one GPU take up to 100 GiB
    memory=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits | sort -n | head -n 1)
    study proof_decoder "$minutes" proof_decoder --seeds 3 --workers $((memory > 120000 ? 2 : 1))
    ;;
*)
    echo "$part is not try, encoder or decoder" >&2
    exit 2
    ;;
esac
wait
find "$out" -name '*.jsonl' -exec wc -l {} +  # none where nothing was left to train
