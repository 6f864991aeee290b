#!/usr/bin/env python
"""Train or evaluate a model: Detectron2's train_net.py for nuclei.

tools/train_net.py --config-file configs/mask_boundary_rcnn.yaml
tools/train_net.py --config-file ... --eval-only MODEL.WEIGHTS output/model_final.pth

An evaluation in the folder of a training writes into OUTPUT_DIR/evaluation.
"""

import nuclei_d2  # noqa: F401 - first, as it silences what importing Detectron2 prints

# isort: split
from detectron2.engine import default_argument_parser, launch
from detectron2.evaluation import print_csv_format, verify_results
from detectron2.utils import comm

from nuclei_d2.engine.setup import checked_config, setup
from nuclei_d2.engine.trainer import NucleiTrainer, build_checkpointer, by_task
from nuclei_d2.utils.errors import NucleiError, run_tool
from nuclei_d2.utils.hardware import usable_gpus


def main(args):
    cfg = setup(args)
    if args.eval_only:
        model = NucleiTrainer.build_model(cfg)
        build_checkpointer(cfg, model).load_exactly(cfg.MODEL.WEIGHTS)
        results = NucleiTrainer.evaluate_and_save(cfg, model)
    else:
        trainer = NucleiTrainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        results = trainer.train()
    if comm.is_main_process():
        for dataset, tasks in results.items():
            print(f"{dataset} (AP in percent)")
            print_csv_format(tasks)
        verify_results(cfg, by_task(results))
    return results


def cli():
    args = default_argument_parser(__doc__).parse_args()
    if args.num_gpus > max(usable_gpus(), 1):
        raise NucleiError(
            f"--num-gpus is {args.num_gpus} but {usable_gpus()} are here; "
            "leave it out to train on one GPU or on the CPU"
        )
    checked_config(args)  # here, before there are many processes to complain
    launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )


if __name__ == "__main__":
    run_tool(cli)
