# Post-train the toy teacher, make pairs with the run and with its export, and clips with guidance.
export OUTPUT_ROOT=out
fewstep prepare toyworld --out datasets/toyworld/train --num 8 --seed 11 --only videos,metas
fewstep prepare text datasets/toyworld/train --text-encoder $TOY
fewstep prepare latents datasets/toyworld/train --codec $TOY
fewstep train experiment=toy_teacher trainer.max_iter=1 optim.warmup_iters=0 trainer.batch_size=4
fewstep pairs out/toyworld/basic/toy_teacher datasets/toyworld/train --out pairs --path-times 2 \
  --num 2 --steps 4 --max-tokens 40 --mask-text --codec $TOY
fewstep export out/toyworld/basic/toy_teacher --out exported --base $TOY
fewstep pairs exported datasets/toyworld/train --out pairs_of_export --num 2 --steps 4 --max-tokens 40 --mask-text --codec $TOY
fewstep generate exported --out clips --seed 3 --guidance 2 --num-steps 4 --num-frames 17 --height 32 --width 32 \
  --prompt "a red sphere rolls right"
