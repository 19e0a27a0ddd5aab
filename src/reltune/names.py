"""The words that flags, files and the library share: criteria, granularities, tasks, data sets. Light to import."""

from __future__ import annotations

CRITERIA = (
    "fisher",
    "fisher_true",
    "gradient",
    "taylor",
    "relative_gradient",
    "gradient_snr",
    "activation",
    "magnitude",
    "spectral_snr",
    "principal",
    "ablation",
    "correlation",
    "movement",
    "random",
    "depth",
)
WITHOUT_DATA = ("magnitude", "spectral_snr", "principal", "random", "depth")  # criteria that look at no data
WITH_DIRECTIONS = ("movement",)  # criteria that score directions of a linear map's input
GRANULARITIES = ("layer", "module", "head", "column", "row", "element", "direction", "bias", "norm")
IN_A_LORA_FILE = ("column", "row", "head", "direction")  # granularities whose change a LoRA adapter holds without loss
LIMITS = ("memory", "time", "hours")  # what a budget can limit beside the number of parameters
FIXABLE = (
    "per_device_train_batch_size",
    "gradient_checkpointing",
)  # fields of training that a budget of memory may change
FROZEN_DTYPES = ("float8_e4m3fn",)  # what the base's frozen weights can be held in, other than their own type
SPREADS = {
    "global": "the best units of the whole model",
    "even": "the same share of every module",
    "columns": "the same share of every module, the best of each column first",
}
EXPORT_FORMS = {
    "lora": "a standard PEFT adapter",
    "merged": "a plain model",
    "gguf": "one file for llama.cpp",
    "ollama": "that file with a Modelfile",
}
REPORT_FORMS = {
    "html": "a page",
    "md": "Markdown, without charts",
    "svg": "the relevance map and the curves as a picture",
    "png": "the same in pixels",
}
IN_GGUF = ("gguf", "ollama")  # of these
CHAT_TEMPLATES = ("chatml", "llama3", "zephyr", "alpaca")  # that come with reltune: tasks/chat_templates.py
GGUF_TYPES = ("f32", "f16", "bf16", "q8_0")  # what a GGUF file can hold matrices in
GGUF_TYPE = "f16"  # if none is named
SERVERS = {"vllm": "one rank for all modules, padded with zeros"}  # that want a LoRA adapter in a form of their own
PREDICTION_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv")  # of the files that predictions are written to

# Data sets that come inside packages; other names are the Hub's.
DATASETS = (
    "bbc_news",
    "movie_reviews",
    "amazon_reviews",
    "nyt_editorials",
    "tweets",
    "reasoning_gym",
    "digits",
)
ON_BAD_ROWS = ("error", "skip")
ON_LEAK = ("warn", "error")  # what becomes of held-out rows that training has too
PREFERENCE_LOSSES = ("sigmoid", "hinge", "ipo")
TASKS = (
    "sequence_classification",
    "multilabel_classification",
    "regression",
    "token_classification",
    "question_answering",
    "seq2seq",
    "causal_lm",
    "masked_lm",
    "preference",
    "image_classification",
)
CONTINUING = ("causal_lm", "preference")  # tasks whose model goes on with a text
WRITING = (*CONTINUING, "seq2seq")  # tasks whose model writes texts
