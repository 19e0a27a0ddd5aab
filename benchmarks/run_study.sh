#!/usr/bin/env bash
# Every way to train side by side, on all GPUs of one machine, in two parts of ten minutes each:
#
#     benchmarks/run_study.sh try DIR         a minute of the first part's methods on one layer, to see that they run there
#     benchmarks/run_study.sh encoder DIR     reads benchmarks/.study_data/encoder.npz
#     benchmarks/run_study.sh decoder DIR     reads the other three files there
#
# writes DIR/PHASE.jsonl and DIR/PHASE.log. Where a phase is cut short, what matters most is done; `selection_tables.py --keep DIR …`
# keeps the records, and `selection_study.py --go_on` runs what is missing. MINUTES is the time for a part.
set -u
part=$1 out=$2
minutes=${MINUTES:-8.8}
scratch=$(mktemp -d)
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$out"

left() {  # minutes until $1 minutes after the start, and at least a half
    awk -v end="$1" -v now="$SECONDS" 'BEGIN { left = end - now / 60; print (left > 0.5 ? left : 0.5) }'
}

study() {  # PHASE, UNTIL, NAME of its scratch, options
    python3 benchmarks/selection_study.py --phase "$1" --minutes "$(left "$2")" --output_dir "$out" --scratch "$scratch/$3" \
        "${@:4}" >> "$out/$1.log" 2>&1
}

few=() many=()
for task in movie amazon nyt tweets bbc movie_score capitals; do few+=("$task, 200 examples"); done
for task in movie movie_score capitals; do many+=("$task, 10000 examples"); done

if [ "$part" = try ]; then
    study proof 2.5 proof --seeds 3 --scale 0.02 --tasks movie &
    study noise 2.5 noise --seeds 3 --scale 0.02 --workers 1 --tasks "bbc, 30% flipped"
    study small_data 2.5 few --seeds 3 --scale 0.02 --workers 1 --tasks "capitals, 10000 examples"
    wait
    grep -h -A 12 Traceback "$out"/*.log
elif [ "$part" = encoder ]; then
    study proof "$minutes" proof --seeds 5 &
    study small_data 3.5 few --seeds 5 --workers 1 --tasks "${few[@]}"
    study noise 6.5 noise --seeds 3 --workers 1
    study small_data "$minutes" many --seeds 3 --workers 1 --tasks "${many[@]}" \
        --methods "weights 0.12%" "LoRA 4" full "random 0.12%" "biases, norms"
else
    main=("weights 1%" "LoRA 8" full "LoRA 8, equal cost" "full, equal cost" "LoRA 16, A from movement and fixed")
    for first in 3 6; do  # more seeds of the phase decoder, at the rates that its first three chose
        study decoder 4 "decoder$first" --chosen_rates --first_seed $first --seeds 3 --methods "${main[@]}"
    done
    study proof_decoder "$minutes" proof_decoder --seeds 3
fi
wait
rm -rf "$scratch"
wc -l "$out"/*.jsonl
