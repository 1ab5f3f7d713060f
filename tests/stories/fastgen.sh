# FastGen's knowledge distillation, experiment $NAME: from clips (of SDXL, pictures) and captions to a student that plain diffusers
# samples. Beside the clips there is the pipeline of the teacher.
export OUTPUT_ROOT=out

fewstep check data clips
fewstep prepare text clips --text-encoder pipeline
fewstep pairs pipeline clips --out datasets/kd --steps 8 --guidance 3.0 --path-times 4 $SHOT
torchrun --nproc_per_node=2 -m fewstep.train --config=fastgen/configs/experiments/$CONFIG - \
  experiment=$NAME teacher=pipeline data.dataset_dir=datasets/kd trainer.max_iter=2 trainer.precision=fp32
fewstep export out/fastgen/$GROUP/$NAME --out student --base pipeline
$PLAIN
