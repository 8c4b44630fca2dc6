#!/bin/bash
# All that is measured on a GPU, in two calls of about six minutes each, on one GPU of 141 GB and 16 cores.
#
#   bash tools/proofs/gpu.sh speed   FOLDER   tests, on the device; then full-size networks, alone on it
#   bash tools/proofs/gpu.sh quality FOLDER   four trainings side by side; needs CIFAR-10 below GENLIGHT_DATA
#   bash tools/proofs/gpu.sh join    FOLDER   docs/results/*.json of what both found
#
# FOLDER holds logs and what is known at any time. PYTHON names the interpreter, SECONDS_EACH the time of a training.
set -u
part=$1 folder=$(mkdir -p "$2" && cd "$2" && pwd) root=$(cd "$(dirname "$0")/../.." && pwd) begun=$SECONDS
python=${PYTHON:-python3} each=${SECONDS_EACH:-340} proofs=tools/proofs
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1 GENLIGHT_CACHE=${GENLIGHT_CACHE:-$folder/cache}
cd "$root" || exit 1

# name, limit in seconds, command: its output goes to a log, its end is told
step() {
    local name=$1 limit=$2
    timeout -s INT -k 5 "$limit" "${@:3}" > "$folder/$name.log" 2>&1
    echo "[$((SECONDS - begun)) s] $name: $? | $(tail -n 1 "$folder/$name.log" | cut -c1-160)"
}

case $part in
speed)
    # compilers are busy meanwhile: what they leave in their caches is not timed later
    step gpu_tests 100 "$python" -m pytest -m gpu -n 2 --timeout 90 --tb short &
    step fit 60 "$python" -m genlight fit run.root="$folder/runs" run.name=fit run.overwrite=true trainer.max_steps=500 trainer.val_check_interval=500 &
    step fsdp 60 "$python" -m genlight fit run.root="$folder/runs" run.name=fsdp run.overwrite=true trainer.max_steps=200 trainer.val_check_interval=200 strategy=fsdp trainer.accelerator=gpu trainer.devices=1 &
    step compiled 90 "$python" -m genlight fit run.root="$folder/runs" run.name=compiled run.overwrite=true trainer.max_steps=200 trainer.val_check_interval=200 module.compile=true trainer.precision=bf16-mixed &
    step suite 105 "$python" -m pytest -n 9 --dist worksteal --timeout 95 -rf --tb short tests/quantization tests/loops tests/modules \
        tests/experts tests/checkpoints tests/diffusion tests/callbacks tests/predictors tests/search tests/metrics tests/nets tests/data &
    step warm 106 nice -n 5 "$python" $proofs/quantized_gpu.py --part sdxl --only-compile --seconds 100 --out "$folder/warm/warm.json" &
    wait
    for given in "pixart 80" "sdxl 72" "gemm 34"; do
        read -r name seconds <<< "$given"
        step "$name" $((seconds + 14)) "$python" $proofs/quantized_gpu.py --part "$name" --seconds "$seconds" --out "$folder/$name/$name.json"
    done
    step experts 56 "$python" $proofs/experts_gpu.py --part speed --seconds 50 --out "$folder/eep_speed.json"
    # it names the machine that it runs on
    step join 30 "$python" $proofs/quantized_gpu.py --join "$folder"/{pixart/pixart,sdxl/sdxl,gemm/gemm}.json
    cp docs/results/quantized_gpu.json "$folder"
    ;;
quality)
    : "${GENLIGHT_DATA:?names no folder with CIFAR-10}"
    # the network of features is in the cache before the others ask for it
    step features 120 "$python" -m genlight fit experiment=features/cifar10 run.overwrite=true trainer.max_steps=2000 &
    step lcsc $((each + 20)) "$python" $proofs/lcsc_cifar.py --seconds "$each" --folder "$folder/lcsc" --out "$folder/lcsc_cifar.json" --parts teacher student features search &
    step dd $((each + 20)) "$python" $proofs/dd_cifar.py --seconds "$each" --folder "$folder/dd" --out "$folder/dd_cifar.json" --parts tokenizer teacher student validate &
    step viditq $((each + 20)) "$python" $proofs/viditq_cifar.py --seconds "$each" --folder "$folder/viditq" --train-seconds $((each / 2)) &
    step eep $((each + 20)) "$python" $proofs/experts_gpu.py --part quality --seconds $((each - 40)) --folder "$folder/eep" --out "$folder/eep_quality.json" &
    wait
    step latency 40 "$python" $proofs/dd_cifar.py --seconds "$each" --folder "$folder/dd" --out "$folder/dd_cifar.json" --parts latency
    cp docs/results/viditq_cifar.json "$folder"
    ;;
join)
    step join_experts 60 "$python" $proofs/experts_gpu.py --join "$folder"/eep_{speed,quality}.json
    cp "$folder"/{quantized_gpu,lcsc_cifar,dd_cifar,viditq_cifar}.json docs/results/
    "$python" -c "from pathlib import Path; from genlight.reports.results_page import write_results_page; write_results_page(Path('docs/results'))"
    ;;
*)
    sed -n '2,8p' "$0"
    exit 2
    ;;
esac
