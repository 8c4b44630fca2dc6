#!/bin/bash
# All that is measured on a GPU, in two calls of six minutes each at most, on one GPU of 141 GB and 16 cores.
#
#   bash tools/proofs/gpu.sh speed   FOLDER   tests, on the device; then full-size networks, alone on it
#   bash tools/proofs/gpu.sh quality FOLDER   four trainings side by side; needs CIFAR-10 below GENLIGHT_DATA
#   bash tools/proofs/gpu.sh join    FOLDER   docs/results/*.json of what both found
#
# FOLDER holds logs and what is known at any time; FOLDER.tar.gz, beside it, the logs and JSON of that, which is all that
# `join` needs: unpack those of both calls into one folder. The limits add up to 360 s (speed) and 355 s (quality).
# PYTHON names the interpreter, SECONDS_EACH the time of a training.
set -u
part=$1 folder=$(mkdir -p "$2" && cd "$2" && pwd) root=$(cd "$(dirname "$0")/../.." && pwd) begun=$SECONDS
python=${PYTHON:-python3} each=${SECONDS_EACH:-290} proofs=tools/proofs
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1 GENLIGHT_CACHE=${GENLIGHT_CACHE:-$folder/cache}
cd "$root" || exit 1
touch "$folder/begun"

# name, limit in seconds, command: its output goes to a log, its end is told
step() {
    local name=$1 limit=$2
    timeout -s INT -k 5 "$limit" "${@:3}" > "$folder/$name.log" 2>&1
    echo "[$((SECONDS - begun)) s] $name: $? | $(tail -n 1 "$folder/$name.log" | cut -c1-160)"
}

# name: keep the record that a program has just written into docs/results
keep() {
    if [ "docs/results/$1.json" -nt "$folder/begun" ]; then cp "docs/results/$1.json" "$folder"; fi
}

pack() {
    (cd "$folder" && find . -type f \( -name '*.log' -o -name '*.json' \) -size -2000k -print0) |
        tar czf "$folder.tar.gz" -C "$folder" --null -T -
}

case $part in
speed)
    digits=("$python" -m genlight fit run.root="$folder/runs" run.overwrite=true)
    # compilers are busy meanwhile: what they leave in their caches is not timed later
    step gpu_tests 98 "$python" -m pytest -m gpu -n 6 --timeout 90 --tb short tests/quantization/kernels \
        tests/diffusion/test_noise_schedules.py tests/diffusion/test_timestep_samplers.py tests/experts/test_export.py &
    step fit 95 "${digits[@]}" run.name=fit trainer.max_steps=500 trainer.val_check_interval=500 &
    # neither averages of weights nor clipping by their norm know weights in shards
    step fsdp 95 "${digits[@]}" run.name=fsdp trainer.max_steps=200 trainer.val_check_interval=200 strategy=fsdp \
        trainer.accelerator=gpu trainer.devices=1 callbacks.ema=null trainer.gradient_clip_val=null &
    step compiled 95 "${digits[@]}" run.name=compiled trainer.max_steps=200 trainer.val_check_interval=200 \
        module.compile=true trainer.precision=bf16-mixed &
    step suite 98 "$python" -m pytest -n 6 --dist worksteal --timeout 90 -rf --tb short tests/quantization tests/loops \
        tests/modules tests/experts tests/checkpoints tests/diffusion tests/callbacks tests/predictors tests/search \
        tests/metrics tests/nets tests/data &
    step warm 98 nice -n 5 "$python" $proofs/quantized_gpu.py --part sdxl --only-compile --seconds 92 --out "$folder/warm/warm.json" &
    wait
    pack
    for given in "pixart 80" "sdxl 60" "gemm 28"; do
        read -r name seconds <<< "$given"
        step "$name" $((seconds + 8)) "$python" $proofs/quantized_gpu.py --part "$name" --seconds "$seconds" --out "$folder/quantized/$name.json"
        pack
    done
    step experts 50 "$python" $proofs/experts_gpu.py --part speed --seconds 42 --out "$folder/eep_speed.json"
    # it names the machine that it runs on
    step join 20 "$python" $proofs/quantized_gpu.py --join "$folder"/quantized/*.json
    keep quantized_gpu
    pack
    ;;
quality)
    : "${GENLIGHT_DATA:?names no folder with CIFAR-10}"
    # the others wait for it, where they need it
    step features "$each" "$python" -m genlight fit experiment=features/cifar10 run.overwrite=true trainer.precision=bf16-mixed \
        trainer.max_time=00:00:01:00 module.lr_scheduler.seconds=60 trainer.num_sanity_val_steps=0 &
    step lcsc $((each + 20)) "$python" $proofs/lcsc_cifar.py --seconds "$each" --folder "$folder/lcsc" --out "$folder/lcsc_cifar.json" --parts teacher student features search &
    step dd $((each + 20)) "$python" $proofs/dd_cifar.py --seconds "$each" --folder "$folder/dd" --out "$folder/dd_cifar.json" --parts tokenizer teacher student validate &
    step viditq $((each + 20)) "$python" $proofs/viditq_cifar.py --seconds "$each" --folder "$folder/viditq" --train-seconds $((each * 2 / 5)) &
    step eep $((each + 20)) "$python" $proofs/experts_gpu.py --part quality --seconds $((each - 30)) --folder "$folder/eep" --out "$folder/eep_quality.json" &
    wait
    keep viditq_cifar
    pack
    step latency 45 "$python" $proofs/dd_cifar.py --seconds "$each" --folder "$folder/dd" --out "$folder/dd_cifar.json" --parts latency
    pack
    ;;
join)
    step join_experts 60 "$python" $proofs/experts_gpu.py --join "$folder"/eep_*.json
    cp "$folder"/{quantized_gpu,lcsc_cifar,dd_cifar,viditq_cifar}.json docs/results/
    "$python" -c "from pathlib import Path; from genlight.reports.results_page import write_results_page; write_results_page(Path('docs/results'))"
    ;;
*)
    sed -n '2,10p' "$0"
    exit 2
    ;;
esac
