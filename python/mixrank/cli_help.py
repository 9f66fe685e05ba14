"""Help that several commands of the command line have in common."""

from __future__ import annotations

IMAGES_HELP = "A folder of images, an ImageFolder tree, or a timm.data dataset name such as hfds/... or torch/cifar10."
LABELS_HELP = "A csv with the columns file,label; without it the class folders of an ImageFolder tree are the labels."
EVAL_HELP = "Images to compare with the dense model on; with labels also for top-1."
JSON_HELP = "Also write the result to this file, as JSON."
MODEL_HELP = "A timm architecture."
MODEL_ARGS_HELP = """Arguments of timm.create_model: '{"img_size": 384}'."""
WEIGHTS_HELP = "A state dict (safetensors, pth); without it timm's pretrained weights."
ROOT_HELP = "The folder in which a named data set lies or is downloaded to."
LIMIT_HELP = "Use a random subset of this many images."
DTYPE_HELP = "Precision of the forward passes, sums aside; auto: bfloat16 where the device multiplies it."
DEVICE_HELP = "cpu, cuda, or auto: a GPU where there is one."
STRICT_HELP = "Fail on an image that does not decode instead of skipping and counting it."
QUIET_HELP = "No progress bars."
