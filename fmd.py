"""fmd: flow map distillation without data, in one file.

A flow model draws samples by solving an ODE: hundreds of evaluations of a network. This file turns such a
teacher into a student that needs one evaluation, and looks at no data while doing so. It follows Tong, Ma,
Xie and Jaakkola, "Flow Map Distillation Without Data" (FreeFlow, arXiv 2511.19428); numbers in [brackets] are
the paper's equations.

Conventions, everywhere in this file
    t = 0 is data, t = 1 is the prior N(0, I), x_t = (1 - t) x + t n;
    u(x_t, t) = E[x - n | x_t], the velocity, points from noise to data;
    delta = 1 - t is how far a path has come: sampling solves dx/d(delta) = u(x, 1 - delta) from x(0) = z;
    f(z, delta) = z + delta F(z, delta) is the student's flow map, f(z, 1) its one-step sample.
Everything is an image, (B, C, H, W); a point of the plane is a 2 x 1 x 1 image. t, delta, r and guidance are
(B,), labels (B,) int64; the label num_classes is the null label, "any class". Instead of B there may be G of
them, each for a group of B / G samples in a row, for which the network then computes its conditioning once.

    python fmd.py                                            # a 2-D toy: teacher, student, figures, pictures
    python fmd.py --toy spirals --seed 1 --out runs/spirals  # another toy
    python fmd.py --toy gaussians --exact-teacher            # a closed-form teacher: errors against the truth
    python fmd.py --toy points.npy                           # your own N x 2 array
    python fmd.py --out runs/toy2d --resume                  # go on after Ctrl-C
    python fmd.py --stage distill --teacher runs/toy2d/teacher.pt --prediction jvp
    python fmd.py --stage sample --out runs/toy2d --samples 1000 --classes 0,3
    python fmd.py --dataset mnist --quick                    # digits, with labels and guidance, on two cores
    python fmd.py --stage sample --out runs/mnist --guidance 4 --classes 3,8
    python fmd.py --stage search --out runs/mnist --reward symmetric
    python fmd.py --dataset imagenet --teacher SiT-XL-2-256x256.pt   # distill a released teacher, on one GPU
    torchrun --nproc_per_node=8 fmd.py --dataset imagenet --teacher repa-xl/2-256     # or on eight
    torchrun --nproc_per_node=8 fmd.py --stage sample --out runs/imagenet --samples 50000 --guidance 1.4
    python fmd.py --stage benchmark --dataset imagenet               # what a step costs here

Read on from the top. Section 5 is the paper; the rest makes it run.
"""

import argparse
import contextlib
import copy
import dataclasses
import datetime
import functools
import json
import math
import os
import pickle
import platform
import shutil
import signal
import sys
import time
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as nnf  # not F: that is the student's average velocity
from matplotlib.animation import FuncAnimation, PillowWriter
from torch import distributed, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recomputed
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets, transforms
from torchvision.utils import make_grid
from tqdm import tqdm


# What the numbers of a run may depend on besides its settings.
VERSIONS = dict(python=platform.python_version(), torch=str(torch.__version__), numpy=np.__version__)


class UserError(Exception):
    """Something the user can mend: (message, exit status 1 or 2). main prints the message as one line."""


# ------------------------------------------------------------------------------------------------------------
# 1. Configuration
# One dataclass holds every setting, with its range and a line of help; the command line is made from it.


def option(default, help, low=-math.inf, high=math.inf, choices=None):
    """A field of Config: default, line of help, closed range or choices."""
    return dataclasses.field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices))


def flag(name):
    """The flag of a field of Config."""
    return "--" + name.replace("_", "-")


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting of a run. Raises UserError (exit status 2) for a value out of its range."""

    # what to learn
    dataset: str = option("toy2d", "which preset", choices=["toy2d", "mnist", "cifar10", "imagenet"])
    toy: str = option("checkerboard", "checkerboard, gaussians, moons, spirals, rings, or a file POINTS.npy")
    latents: str = option("", "ImageNet's latents, FILE.npy, to train a teacher, or for --encode to write")
    exact_teacher: bool = option(False, "distill the closed-form velocity of --toy gaussians")
    seed: int = option(0, "decides everything random", 0)
    # network: teacher, student and critic alike
    hidden_size: int = option(48, "width", 8)
    depth: int = option(4, "blocks", 1)
    num_heads: int = option(1, "attention heads", 1)
    patch_size: int = option(1, "side of a token, in pixels", 1)
    # machine: what fits and what is fast; none of these but the precision changes results beyond rounding
    precision: str = option("float32", "of the networks in training; weights and losses stay float32",
                            choices=["float32", "bfloat16"])
    micro_batch_size: int = option(0, "samples a process takes at once; more are accumulated; 0: all", 0)
    activation_checkpointing: bool = option(False, "recompute blocks in the backward pass: memory for time")
    compile: bool = option(False, "torch.compile the networks")
    # both stages
    group_size: int = option(1, "samples that share time and label; their conditioning is computed once", 1)
    optimizer: str = option("adamw", "of the MLPs' matrices; AdamW has the rest", choices=["adamw", "muon"])
    warmup: int = option(100, "steps in which the learning rate rises; it also falls, linearly to 0", 0)
    ema_decay: float = option(0.995, "of the average of the weights, which is what is kept and scored", 0, 1)
    clip: float = option(1.0, "largest gradient norm, of each network by itself", 1e-12)
    label_dropout: float = option(0.1, "share of labels replaced by the null label", 0, 1)
    flip: bool = option(False, "mirror half of the pictures of the data")
    # teacher: flow matching
    teacher_steps: int = option(3000, "training steps of the teacher", 1)
    teacher_batch_size: int = option(256, "samples a step of the teacher", 1)
    teacher_learning_rate: float = option(1e-4, "peak", 0)
    t_location: float = option(0.0, "t = sigmoid(N(t_location, 1)); a lower one trains nearer to the data")
    teacher_format: str = option("", "sit or repa, for a pretrained file that does not tell",
                                 choices=["", "sit", "repa"])
    # student: prediction [7, 8, 9]
    method: str = option("prior", "prior: the paper's; two rivals: regression, on pairs of noise and end, "
                         "and meanflow, on noised data", choices=["prior", "regression", "meanflow"])
    steps: int = option(3000, "training steps of the student", 1)
    batch_size: int = option(256, "samples a step of the student", 1)
    learning_rate: float = option(1e-4, "peak", 0)
    prediction: str = option("step", "form of the derivative", choices=["step", "jvp", "difference"])
    delta_power: float = option(1.0, "delta = 1 - U(0, 1)^delta_power; above 1: more near 1, the data", 0.1)
    step_size: float = option(0.25, "longest stretch of the form 'step'; half of it is the shortest", 1e-4, 1)
    step_count: int = option(1, "RK4 steps of the teacher over a stretch", 1)
    end_share: float = option(0.0, "of the stretches of the form 'step', at delta = 1, as samples are", 0, 1)
    ema_target: bool = option(False, "a stretch begins where the student's averaged weights say, which are "
                              "less noisy")
    difference_size: float = option(0.005, "half-width of the form 'difference'", 1e-5, 0.5)
    decay: float = option(0.5, "k: D_G is divided by (||D_G||^2/d + eps)^k", 0, 1)
    eps: float = option(1e-3, "keeps decay and balance away from dividing by 0", 1e-12)
    # student: correction [10, 11]
    correction_share: float = option(0.25, "of the batch; 0: predict only, 1: correct only", 0, 1)
    alpha: float = option(0.3, "lambda is alpha E||D_G|| / E||D_N||", 0)
    critic_learning_rate: float = option(1e-4, "peak; the critic has to keep up with the student", 0)
    r_location: float = option(0.8, "r = sigmoid(N(r_location, r_scale^2)), in the correction")
    r_scale: float = option(1.0, "see r_location", 0)
    # guidance, of the teacher in both
    guidance_min: float = option(1.0, "the student is trained for guidance strengths from here", 0)
    guidance_max: float = option(1.0, "... to here; both 1: no guidance", 0)
    guidance_interval: tuple = option((0.0, 1.0), "guidance acts for t from here to there", 0, 1)
    correction_interval: tuple = option((0.0, 1.0), "the same, in the correction", 0, 1)
    # measuring and keeping
    guidance: float = option(0.0, "strength of samples and scores; 0: the smallest trained for", 0)
    score_labels: bool = option(True, "sample and score labels in turn, not the unlabelled model")
    threads: int = option(0, "of the CPU, at most; 0: as many as torch takes", 0)
    solver_steps: int = option(64, "RK4 steps to the teacher's endpoints", 1)
    eval_samples: int = option(20000, "samples of each set behind SW2", 2)
    eval_paths: int = option(1000, "noises whose paths are compared; half of them for the progress bar", 2)
    eval_batch_size: int = option(4000, "samples a call when measuring", 1)
    log_interval: int = option(50, "steps between lines of metrics.jsonl", 1)
    eval_interval: int = option(250, "steps between endpoint errors in the progress bar", 1)
    checkpoint_interval: int = option(500, "steps between checkpoints", 1)

    def __post_init__(self):
        def need(condition, message):
            if not condition:
                raise UserError(message, 2)

        for f in dataclasses.fields(self):
            value, low, high = getattr(self, f.name), f.metadata["low"], f.metadata["high"]
            choices = f.metadata["choices"] or [value]
            need(value in choices, f"{flag(f.name)} {value}: choose from {', '.join(map(str, choices))}")
            for v in value if isinstance(value, tuple) else [value]:
                need(isinstance(v, str) or low <= v <= high and math.isfinite(v),
                     f"{flag(f.name)} {v}: give a finite number from {low} to {high}")
            need(not isinstance(value, tuple) or len(value) == 2 and value[0] <= value[1],
                 f"{flag(f.name)}: give two numbers, the smaller one first")
        need(not self.toy or self.dataset == "toy2d",
             f"--toy {self.toy}: leave it away, --dataset {self.dataset} has no toys")
        need(self.toy in TOYS or self.toy.endswith(".npy") or self.dataset != "toy2d",
             f"--toy {self.toy}: choose from {', '.join(TOYS)}, or name an .npy file of points")
        need(self.toy == "gaussians" or not self.exact_teacher,
             f"--exact-teacher: only --toy gaussians has a closed form, {self.toy} has none")
        need(self.hidden_size % (4 * self.num_heads) == 0,
             f"--hidden-size {self.hidden_size}: give a multiple of 4 x --num-heads {self.num_heads}")
        for name in "batch_size", "teacher_batch_size":
            need(getattr(self, name) % self.group_size == 0,
                 f"{flag(name)} {getattr(self, name)}: give a multiple of --group-size {self.group_size}")
        need(self.correction_share in (0, 1) or 0 < self.corrections < self.batch_size
             or self.method == "meanflow",
             f"--batch-size {self.batch_size} cannot be split by --correction-share {self.correction_share} "
             f"into whole groups of --group-size {self.group_size}: give a larger batch")
        need(self.prediction != "difference" or self.precision == "float32",
             "--prediction difference drowns in bfloat16's rounding: use jvp, step or --precision float32")
        need(self.method != "meanflow" or self.guidance_interval == (0.0, 1.0),
             "--method meanflow: its steps would straddle the ends of a --guidance-interval: leave it away")
        need(not self.flip or self.dataset != "imagenet", "--flip: mirror pictures before they are encoded")
        need(not self.latents or self.dataset == "imagenet", "--latents: they are for --dataset imagenet")
        need(self.guidance_min <= self.guidance_max, "--guidance-min is above --guidance-max: exchange them")
        need(self.guidance == 0 or self.guidance_min <= self.guidance <= self.guidance_max,
             f"--guidance {self.guidance}: the student is trained for strengths from {self.guidance_min} to "
             f"{self.guidance_max}; give one of them")

    @property
    def corrections(self):
        """How many samples of a batch go to the correction: whole groups; none of meanflow's."""
        share = 0 if self.method == "meanflow" else self.correction_share
        return round(self.batch_size * share / self.group_size) * self.group_size

    @property
    def is_guided(self):
        return (self.guidance_min, self.guidance_max) != (1.0, 1.0)

    @property
    def strength(self):
        """Guidance strength of samples and scores; None without guidance."""
        return (self.guidance or self.guidance_min) if self.is_guided else None


# What differs from the defaults. Pictures: for GPUs, not run yet; imagenet is XL/2, its batch, decay and
# correction_interval are the paper's, the rest is ours. label_dropout: a toy is scored without labels, and
# with one label in ten dropped the unlabelled model would get a tenth of the training (README, "Differences
# from the paper").
PICTURES = dict(toy="", guidance_max=4.0, guidance=2.0, correction_interval=(0.0, 0.7), patch_size=2,
                hidden_size=384, depth=12, num_heads=6, ema_decay=0.999, teacher_learning_rate=3e-4,
                eval_samples=5000, eval_paths=256, eval_batch_size=250, solver_steps=32,
                checkpoint_interval=1000)
PRESETS = {
    "toy2d": dict(label_dropout=0.75, t_location=-0.8, group_size=8, optimizer="muon", threads=2,
                  teacher_steps=1000, teacher_batch_size=512, teacher_learning_rate=8e-3, steps=1000,
                  learning_rate=8e-3, critic_learning_rate=1.6e-2, delta_power=1.5, end_share=0.5,
                  step_size=0.5, step_count=2, ema_target=True, score_labels=False),
    "mnist": dict(PICTURES, teacher_steps=20000, steps=20000),
    "cifar10": dict(PICTURES, teacher_steps=200000, steps=100000, flip=True),
    "imagenet": dict(PICTURES, hidden_size=1152, depth=28, num_heads=16, precision="bfloat16",
                     micro_batch_size=32, teacher_steps=400000, teacher_learning_rate=1e-4, steps=100000,
                     guidance_max=3.0, guidance=1.4, decay=1.0, alpha=1.0, ema_decay=0.9999,
                     eval_samples=2000, eval_paths=64, eval_batch_size=50, eval_interval=1000,
                     checkpoint_interval=2500),
}
# With --quick: minutes on two cores.
QUICK_PICTURES = dict(hidden_size=96, depth=4, num_heads=3, patch_size=4, optimizer="muon", eval_samples=500,
                      eval_paths=128, solver_steps=16, checkpoint_interval=250, teacher_steps=2500,
                      teacher_batch_size=64, teacher_learning_rate=1e-2, steps=1200, batch_size=64,
                      learning_rate=5e-3, critic_learning_rate=5e-3, ema_decay=0.995)
QUICK = {"toy2d": dict(teacher_steps=300, steps=300, eval_samples=4000),
         "mnist": QUICK_PICTURES, "cifar10": QUICK_PICTURES}


def generator(*key):
    """A random generator that depends on the integers in `key` alone: seed, stream, step. A step's randomness
    is then a function of its number, and resuming needs no generator's state."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


TEACHER, STUDENT, NETWORK, EVALUATION, SAMPLING, PAIRS, SEARCH, ENCODING = range(1, 9)  # streams


# ------------------------------------------------------------------------------------------------------------
# 2. Data
# Pictures come from torchvision. A toy is a skeleton and some blur: pick a label, then a place v on its
# skeleton, a curve, a cell or a point. The skeleton also tells which samples lie outside the toy, and in
# which of its parts the others are.


class Toy(NamedTuple):
    """A density in the plane, of standard deviation near 1; all labels are equally likely."""
    skeleton: Callable  # labels (n,), places (n, 2) in [0, 1]^2 -> points (n, 2)
    num_classes: int
    blur: float  # standard deviation; 0: the skeleton is an area
    arcs: int  # parts of a label


def polar(radius, angle):
    """Points (n, 2); the angle is in radians."""
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1)


TOYS = {
    "checkerboard": Toy(lambda k, v: torch.stack([2 * (k % 2) + k // 2 % 2, k // 2], 1) - 2 + v, 8, 0.0, 1),
    "gaussians": Toy(lambda k, v: polar(1.4, k * math.pi / 4), 8, 0.15, 1),
    "moons": Toy(lambda k, v: (1 - 2 * k)[:, None] * (polar(1.4, math.pi * v[:, 0]) - torch.tensor(
        [0.7, 0.35])), 2, 0.08, 4),
    "spirals": Toy(lambda k, v: polar(2 * (1 - 2 * k) * v[:, 0].sqrt(), 6 * v[:, 0].sqrt()), 2, 0.06, 4),
    "rings": Toy(lambda k, v: polar(1.15, 2.1 * k) + polar(0.7, 2 * math.pi * v[:, 0]), 3, 0.06, 4),
}


def read_array(path, asked, **how):
    """The array of an .npy file, which the flag `asked` named. Raises UserError."""
    try:
        return np.load(path, allow_pickle=False, **how)
    except (OSError, ValueError, EOFError) as e:
        raise UserError(f"cannot read {path} ({e}): {asked} takes a file as numpy.save writes it") from e


class ToyData:
    """One of TOYS, or the rows of an .npy file, which have no labels. draw(n, generator) gives points
    (n, 2, 1, 1) and labels, one for every `group` points in a row. Raises UserError for a file that does not
    hold N x 2 finite numbers."""

    shape = (2, 1, 1)

    def __init__(self, name):
        self.toy, self.num_classes = TOYS.get(name), 0
        if self.toy:
            self.num_classes = self.toy.num_classes
            return
        points = read_array(name, "--toy")
        if points.ndim != 2 or points.shape[1] != 2 or points.dtype.kind not in "fiu" or not len(points):
            raise UserError(f"{name} holds {points.dtype} of shape {points.shape}: --toy needs N x 2 numbers")
        if not np.isfinite(points).all():
            raise UserError(f"{name} holds numbers that are not finite: take them out")
        print(f"{name}: {len(points)} points, standard deviation {points.std():.2f}; near 1 learns best")
        self.points = torch.as_tensor(points, dtype=torch.float32)

    def draw(self, n, generator, group=1):
        y = torch.randint(max(self.num_classes, 1), (n // group,), generator=generator)
        if self.toy is None:
            return self.points[torch.randint(len(self.points), (n,), generator=generator), :, None, None], y
        x = self.toy.skeleton(y.repeat_interleave(group), torch.rand(n, 2, generator=generator))
        return (x + self.toy.blur * torch.randn(n, 2, generator=generator))[:, :, None, None], y


class LabelledData:
    """Images with labels. draw(n, generator) gives images (n, C, H, W) and labels, one for every `group`
    images in a row. A subclass has num_classes, shape and take(indices, generator) -> images."""

    def sort(self, y):
        """Make draws possible: y (N,) int64 are the labels of images 0 to N - 1."""
        self.order = y.argsort(stable=True)
        self.y, self.count = y[self.order], y.bincount(minlength=self.num_classes)
        self.first = self.count.cumsum(0) - self.count

    def draw(self, n, generator, group=1):
        y = self.y[torch.randint(len(self.y), (n // group,), generator=generator)]
        k = y.repeat_interleave(group)
        place = (torch.rand(n, generator=generator) * self.count[k]).long().minimum(self.count[k] - 1)
        return self.take(self.order[self.first[k] + place], generator), y


class PictureData(LabelledData):
    """MNIST or CIFAR-10 through torchvision, from `folder`, into which it is downloaded if it is not there;
    pictures are in [-1, 1]. Raises UserError for files that are wrong, cut off or not to be had."""

    num_classes = 10

    def __init__(self, name, folder, flip=False):
        source, self.flip = {"mnist": datasets.MNIST, "cifar10": datasets.CIFAR10}[name], flip
        try:
            try:
                found = source(folder, train=True)
            except RuntimeError as e:
                if "not found" not in str(e):
                    raise
                found = source(folder, train=True, download=True)
            x, y = torch.as_tensor(found.data), torch.as_tensor(found.targets)
            if len(x) != len(y) or len(y) < 1 or y.max() >= self.num_classes or x.shape[1] != x.shape[2]:
                raise ValueError(f"{len(x)} pictures, {len(y)} labels")
        except (OSError, RuntimeError, ValueError, AssertionError, LookupError, EOFError) as e:
            raise UserError(f"{name} in {folder} is not whole and cannot be downloaded ({e}): delete what is "
                            "there and go online, put its files there by hand, or name another --data") from e
        self.x = x.unsqueeze(-1).flatten(3).permute(0, 3, 1, 2)  # (N, C, H, W), uint8
        self.shape = tuple(self.x.shape[1:])
        self.sort(y)

    def take(self, indices, generator):
        x = self.x[indices] / 127.5 - 1
        if self.flip:
            x = torch.where(torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5, x, x.flip(3))
        return x


VAE = "stabilityai/sd-vae-ft-ema"
LATENT_SCALE = 0.18215  # of Stable Diffusion's autoencoder: latents have a standard deviation near 1


def labels_beside(path):
    """Where the labels of FILE.npy are: FILE_labels.npy."""
    return Path(path).with_name(f"{Path(path).stem}_labels.npy")


class LatentData(LabelledData):
    """ImageNet as encode() writes it: FILE.npy, latents (N, 4, S, S) in float16 or float32, which stay on the
    disk, and FILE_labels.npy, (N,) whole numbers from 0 to 999; the largest there is the last label. Raises
    UserError for anything else."""

    def __init__(self, path):
        beside = labels_beside(path)
        x, y = read_array(path, "--latents", mmap_mode="r"), read_array(beside, "--latents, for its labels,")
        shape = x.shape if x.ndim == 4 else (0, 0, 0, 0)
        if shape[1] != 4 or shape[2] != shape[3] or x.dtype not in ("float16", "float32"):
            raise UserError(f"{path} holds {x.dtype} of shape {x.shape}: --latents takes N x 4 x S x S in "
                            "float16 or float32; --encode FOLDER makes it of pictures")
        if y.shape != (len(x),) or y.dtype.kind not in "iu" or not len(y) or y.min() < 0 or y.max() > 999:
            raise UserError(f"{beside} does not hold {len(x)} whole numbers from 0 to 999: give a label for "
                            f"each row of {path}")
        self.x, self.shape, self.num_classes = x, x.shape[1:], int(y.max()) + 1
        self.sort(torch.as_tensor(y.astype(np.int64)))
        some = self.take(torch.linspace(0, len(x) - 1, min(len(x), 1000)).long())
        if not some.isfinite().all():
            raise UserError(f"{path} holds numbers that are not finite: encode it anew")
        print(f"{path}: {len(x)} latents, {self.num_classes} labels, standard deviation {some.std():.2f}; "
              "near 1 learns best")

    def take(self, indices, generator=None):
        return torch.from_numpy(self.x[indices.numpy()].astype(np.float32))


def load_vae(name, device):
    """The autoencoder behind latents, through diffusers: a name on its hub or a folder. Raises UserError."""
    try:
        from diffusers import AutoencoderKL  # optional, and slow to import

        vae = AutoencoderKL.from_pretrained(name, low_cpu_mem_usage=False)
        return vae.to(device).eval().requires_grad_(False)
    except ImportError as e:
        raise UserError(f"--vae {name} needs diffusers ({e}): pip install diffusers") from e
    except (OSError, ValueError, RuntimeError) as e:
        raise UserError(f"--vae {name} cannot be had ({type(e).__name__}): go online, or name a folder that "
                        "holds its config.json and weights") from e


def as_pictures(x, vae=None, size=8):
    """Samples (N, C, H, W) as they are looked at. Points and pictures are as they are; latents are decoded,
    `size` at a time, or, without an autoencoder, stand for themselves by three of their channels."""
    if x.shape[1] != 4:
        return x
    if vae is None:
        return x[:, :3].cpu() / 2
    with torch.no_grad():
        parts = (part.to(vae.device) / LATENT_SCALE for part in x.split(size))
        return torch.cat([vae.decode(part).sample.cpu() for part in parts])


def encode(folder, path, vae, seed=0, side=256, size=16, interval=100, resume=False, overwrite=False):
    """Write what LatentData reads, in float16: a sample of the autoencoder's posterior for each picture of a
    folder of folders, one a class, cut to side x side from its middle. A file .part grows beside `path`, and
    with resume=True one that was left is continued, to the same numbers. Raises UserError."""
    look = transforms.Compose([
        transforms.Resize(side, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(side),
        transforms.ToTensor(), transforms.Normalize(0.5, 0.5)])
    try:
        pictures = datasets.ImageFolder(folder, look)
    except (OSError, RuntimeError) as e:
        raise UserError(f"--encode {folder}: give a folder of folders of pictures, one a class ({e})") from e
    if len(pictures.classes) > 1000:
        raise UserError(f"--encode {folder} has {len(pictures.classes)} classes: give 1000 at most")
    part, progress = path.with_suffix(".part.npy"), path.with_suffix(".part.txt")
    if (path.exists() or part.exists()) and not resume and not overwrite:
        raise UserError(f"{path} is there, or begun: --resume goes on with it, --overwrite replaces it", 2)
    if path.exists() and resume:
        return print(f"{path} is finished: --overwrite encodes it anew")
    device = next(vae.parameters()).device
    first = int(progress.read_text()) if resume and progress.exists() else 0
    channels, scale = vae.config.latent_channels, 2 ** (len(vae.config.block_out_channels) - 1)
    shape = len(pictures), channels, side // scale, side // scale
    if channels != 4:
        raise UserError(f"--vae has {channels} channels: give one of 4, as Stable Diffusion's first")
    if not first:
        progress.unlink(missing_ok=True)
    latents = np.lib.format.open_memmap(part, "r+" if first else "w+", np.float16, shape)
    if latents.shape != shape:
        raise UserError(f"{part} is of other pictures, {latents.shape}, not {shape}: give --overwrite", 2)
    batches = torch.arange(len(pictures)).split(size)
    loader = torch.utils.data.DataLoader(pictures, batch_sampler=[b.tolist() for b in batches[first:]],
                                         num_workers=min(8, os.cpu_count() or 1))
    with torch.no_grad():
        read = iter(tqdm(loader, "encode", len(batches), initial=first, disable=None))
        for i in range(first, len(batches)):
            try:
                x, _ = next(read)
            except OSError as e:  # with the traceback of a worker as its text
                raise UserError(f"a picture cannot be read ({str(e).splitlines()[-1]}): mend or replace it; "
                                "--resume goes on") from e
            d = vae.encode(x.to(device)).latent_dist
            n = torch.randn(d.mean.shape, generator=generator(seed, ENCODING, i)).to(device)
            latents[batches[i].numpy()] = (LATENT_SCALE * (d.mean + d.std * n)).cpu().numpy()
            if (i + 1) % interval == 0:
                latents.flush()
                save(progress, lambda p, done=i + 1: p.write_text(str(done)))
    latents.flush()
    save(labels_beside(path), lambda p: np.save(p, np.array(pictures.targets)))
    os.replace(part, path)
    progress.unlink(missing_ok=True)
    print(f"{len(pictures)} latents of {len(pictures.classes)} classes are in {path}, labels beside it")


def open_data(config, folder):
    """The data of config.dataset, for the teacher. Raises UserError."""
    if config.dataset == "imagenet" and not config.latents:
        raise UserError("--dataset imagenet: give a --teacher to distill, a file of fmd, SiT or REPA or one "
                        f"of {', '.join(RELEASED)}; or --latents FILE.npy to train one", 2)
    if config.toy:
        data = ToyData(config.toy)
    elif config.latents:
        data = LatentData(config.latents)
    else:
        data = PictureData(config.dataset, folder, config.flip)
    if data.shape[1] % config.patch_size:
        raise UserError(f"--patch-size {config.patch_size} does not divide the side {data.shape[1]}", 2)
    return data


# ------------------------------------------------------------------------------------------------------------
# 3. Network
# The diffusion transformer (DiT, arXiv 2212.09748), with the tensor names of public DiT, SiT and REPA code.
# A point is one token, over which attention is a linear map: the same network serves toys and pictures.


def expand(v, x):
    """Numbers of groups, (G,), to multiply images x (B, C, H, W) that lie group by group: (B, 1, 1, 1)."""
    return v.repeat_interleave(len(x) // len(v))[:, None, None, None]


def named(**layers):
    """nn.Sequential with names instead of numbers."""
    return nn.Sequential(OrderedDict(layers))


def float32(x):
    """A context without autocast, for what embeds times and for the last layer: they cost little, and in
    bfloat16 they alone would make a third of the error of D_G."""
    on = torch.is_autocast_enabled(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if on else contextlib.nullcontext()


class Embedder(nn.Module):
    """A number a sample, (B,) -> (B, D): cosines and sines of it, then a small MLP.

    No frequency is above 1: the prediction's target holds dF/ddelta, whose error a frequency multiplies.
    """

    def __init__(self, hidden_size):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, v):
        frequencies = torch.exp(-math.log(10000) / 128 * torch.arange(128, device=v.device))
        angle = v[:, None] * frequencies  # (B, 128)
        with float32(v):
            return self.mlp(torch.cat([angle.cos(), angle.sin()], 1))


def modulate(x, shift, scale):
    """LayerNorm without weights of its own; the conditioning supplies them."""
    return nnf.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Attention(nn.Module):
    """Self-attention among every T tokens in a row of (G, B / G * T, D); qk_norm: LayerNorm of both."""

    def __init__(self, D, num_heads, qk_norm):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.q_norm = nn.LayerNorm(D // num_heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(D // num_heads) if qk_norm else nn.Identity()

    def forward(self, x, T):
        G, _, D = x.shape
        if T == 1:  # a token that attends to itself alone is its value
            return self.proj(nnf.linear(x, self.qkv.weight[2 * D:], self.qkv.bias[2 * D:]))
        q, k, v = self.qkv(x).view(-1, T, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
        x = nnf.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)  # (B, heads, T, d)
        return self.proj(x.transpose(1, 2).reshape(G, -1, D))


class Block(nn.Module):
    """Attention and MLP on tokens x (G, B / G * T, D), shifted, scaled and gated by conditioning c (G, D)."""

    def __init__(self, D, num_heads, qk_norm):
        super().__init__()
        self.attn = Attention(D, num_heads, qk_norm)
        self.mlp = named(fc1=nn.Linear(D, 4 * D), act=nn.GELU("tanh"), fc2=nn.Linear(4 * D, D))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))

    def forward(self, x, c, T):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c)[:, None].chunk(6, 2)
        x = x + gate_a * self.attn(modulate(x, shift_a, scale_a), T)  # shifts, scales, gates are (G, 1, D)
        return x + gate_m * self.mlp(modulate(x, shift_m, scale_m))


class FinalLayer(nn.Module):
    """Tokens (G, N, D) -> patches (G, N, outputs), shifted and scaled by the conditioning c (G, D)."""

    def __init__(self, D, outputs):
        super().__init__()
        self.linear = nn.Linear(D, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 2 * D))

    def forward(self, x, c):
        with float32(x):
            return self.linear(modulate(x, *self.adaLN_modulation(c)[:, None].chunk(2, 2)))


def position_embedding(D, side):
    """(1, side * side, D): sines and cosines of a token's column, then of its row."""
    frequencies = 10000 ** (-4 * torch.arange(D // 4, dtype=torch.float64) / D)
    angle = torch.arange(side, dtype=torch.float64)[:, None] * frequencies  # (side, D / 4)
    line = torch.cat([angle.sin(), angle.cos()], 1)  # (side, D / 2)
    return torch.cat([line.repeat(side, 1), line.repeat_interleave(side, 0)], 1)[None].float()


class DiT(nn.Module):
    """A velocity network u(x, t | y), and with guidance=True u(x, t | y, strength).

    forward: x (B, C, H, W); t (G,) in [0, 1]; y (G,) or None, the null label; guidance (G,) or None, strength
    1 -> (B, C, H, W). start_time=True gives it a second time, (G,) or None, 1: see FlowMap. Raises ValueError
    for guidance or start_time without an input for it.
    """

    def __init__(self, input_size=1, in_channels=2, num_classes=8, hidden_size=64, depth=3, num_heads=1,
                 patch_size=1, qk_norm=False, guidance=False, start_time=False):
        super().__init__()
        D, p = hidden_size, patch_size
        self.settings = dict(input_size=input_size, in_channels=in_channels, num_classes=num_classes,
                             hidden_size=D, depth=depth, num_heads=num_heads, patch_size=p, qk_norm=qk_norm,
                             guidance=guidance, start_time=start_time)
        self.shape, self.num_classes, self.patch_size = (in_channels, input_size, input_size), num_classes, p
        self.x_embedder = named(proj=nn.Conv2d(in_channels, D, p, stride=p))
        self.register_buffer("pos_embed", position_embedding(D, input_size // p))
        self.t_embedder = Embedder(D)
        self.y_embedder = named(embedding_table=nn.Embedding(num_classes + 1, D))
        self.guidance_embedder = Embedder(D) if guidance else None
        self.start_time_embedder = Embedder(D) if start_time else None
        self.blocks = nn.ModuleList(Block(D, num_heads, qk_norm) for _ in range(depth))
        self.final_layer = FinalLayer(D, p * p * in_channels)
        self.activation_checkpointing = False
        self.initialize()

    def initialize(self):
        """As in DiT, a block begins as the identity and the output as zero. Unlike there, embedders begin by
        their width and patches as unit tokens, without which networks as narrow as a toy's learn slowly."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or "adaLN_modulation" in name or "final_layer" in name:
                nn.init.zeros_(parameter)
            elif "x_embedder" in name:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
            elif parameter.ndim == 2:
                nn.init.xavier_uniform_(parameter)
        for embedder in filter(None, [self.guidance_embedder, self.start_time_embedder]):
            nn.init.zeros_(embedder.mlp[2].weight)  # so that from_teacher begins as the teacher

    @classmethod
    def from_tensors(cls, settings, tensors):
        """A network with these tensors, in float32, without drawing others first: XL is large. Raises
        RuntimeError for tensors that do not fit."""
        with torch.device("meta"):
            network = cls(**settings)
        network.load_state_dict({k: v.float().clone() for k, v in tensors.items()}, assign=True)
        return network

    @classmethod
    def from_teacher(cls, teacher, guidance=False, start_time=False):
        """A network of this class with the teacher's weights; inputs for guidance and start time change
        nothing yet."""
        tensors = teacher.state_dict()
        of_time = [k for k in tensors if k.startswith("t_embedder.")]
        for extra in ["guidance"] * guidance + ["start_time"] * start_time:
            for name in of_time:
                # begins as that of the times, not at random, but for the output, which begins at zero
                first = tensors[name] if ".mlp.0." in name else torch.zeros_like(tensors[name])
                tensors.setdefault(name.replace("t_embedder", f"{extra}_embedder"), first)
        settings = {**teacher.settings, "guidance": guidance, "start_time": start_time}
        return cls.from_tensors(settings, tensors)

    def forward(self, x, t, y=None, guidance=None, start_time=None):
        c = self.t_embedder(t)
        c = c + self.y_embedder(torch.full_like(t, self.num_classes, dtype=torch.int64) if y is None else y)
        for embedder, v in (self.guidance_embedder, guidance), (self.start_time_embedder, start_time):
            if embedder is not None:
                c = c + embedder(torch.ones_like(t) if v is None else v)
            elif v is not None:
                raise ValueError("this network has no input for guidance or start_time: build it with "
                                 "one, by guidance_max above 1 or method meanflow")
        (C, H, W), p = self.shape, self.patch_size
        x = x.reshape(-1, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5).reshape(len(x), -1, C * p * p)
        proj = self.x_embedder.proj  # a convolution by name and shape, a matrix by what it does
        x = nnf.linear(x, proj.weight.flatten(1), proj.bias) + self.pos_embed  # (B, T, D), tokens row by row
        T, x = x.shape[1], x.reshape(len(c), -1, x.shape[2])  # (G, B / G * T, D): one conditioning a group
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = recomputed(block, x, c, T, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, c, T)
        x = self.final_layer(x, c).view(-1, H // p, W // p, p, p, C)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, C, H, W)


# ------------------------------------------------------------------------------------------------------------
# 4. Teacher
# A teacher is anything that can be called as u(x, t, y=None): a network trained by flow matching, the closed
# form, or either of them under guidance.


def noised(x, n, t):
    """The interpolant I_t(x, n) = (1 - t) x + t n."""
    return expand(1 - t, x) * x + expand(t, x) * n


class FlowMatching(nn.Module):
    """The teacher's loss: u(x_t, t) is regressed on x - n, whose mean it is. forward -> loss, figures."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, batch):
        x, n, t, y = batch["x"], batch["n"], batch["t"], batch["y"]
        loss = (self.network(noised(x, n, t), t, y) - (x - n)).square().mean()
        return loss, {"flow_matching": loss.detach()}


def draw_data(data, config, step):
    """The teacher's batch of a step: data, noise, times, and labels of which some are dropped."""
    g = generator(config.seed, TEACHER, step)
    x, y = data.draw(config.teacher_batch_size, g, config.group_size)
    y = torch.where(torch.rand(len(y), generator=g) < config.label_dropout, data.num_classes, y)
    t = torch.sigmoid(config.t_location + torch.randn(len(y), generator=g))
    return dict(x=x, y=y, t=t, n=torch.randn(x.shape, generator=g))


class ExactTeacher(nn.Module):
    """The exact velocity of data from a mixture of equally likely Gaussians. Label k is component k alone.

    means (K, d), stds (K,) > 0. p_t is a mixture again, with means (1 - t) mu_k and variances
    (1 - t)^2 s_k^2 + t^2, and u is the components' E[x - n | x_t, k], weighted by their responsibilities.
    """

    def __init__(self, means, stds):
        super().__init__()
        self.register_buffer("means", torch.as_tensor(means, dtype=torch.float32))
        self.register_buffer("stds", torch.as_tensor(stds, dtype=torch.float32))
        self.num_classes, self.shape = len(self.means), (self.means.shape[-1], 1, 1)
        if self.stds.shape != (self.num_classes,) or (self.stds <= 0).any():
            raise ValueError("ExactTeacher needs means (K, d) and K positive standard deviations")

    def forward(self, x, t, y=None):
        t = t.repeat_interleave(len(x) // len(t))[:, None]  # (B, 1)
        variance = (1 - t) ** 2 * self.stds**2 + t**2  # (B, K)
        offset = x.flatten(1)[:, None] - (1 - t)[..., None] * self.means  # (B, K, d)
        log_weight = -offset.square().sum(2) / (2 * variance) - offset.shape[2] / 2 * variance.log()
        if y is not None:
            k = torch.arange(self.num_classes, device=y.device)
            y = y.repeat_interleave(len(x) // len(y))[:, None]
            allowed = (y == k) | (y == self.num_classes)
            log_weight = log_weight.masked_fill(~allowed, -math.inf)
        slope = ((1 - t) * self.stds**2 - t) / variance  # E[x - n | x_t, k] = mu_k + slope offset
        velocity = self.means + slope[..., None] * offset  # (B, K, d)
        return (log_weight.softmax(1)[..., None] * velocity).sum(1).view_as(x)

    def draw(self, n, generator, group=1):
        """Its data: points (n, d, 1, 1), and labels as ToyData draws them."""
        y = torch.randint(self.num_classes, (n // group,), generator=generator).to(self.means.device)
        k = y.repeat_interleave(group)
        noise = torch.randn(n, *self.shape, generator=generator).to(self.means)
        return self.means[k, :, None, None] + self.stds[k, None, None, None] * noise, y


def guided(teacher, guidance, interval=(0.0, 1.0)):
    """Classifier-free guidance as another teacher, gamma u(.|y) + (1 - gamma) u(.|null).

    guidance: gamma, a number, (B,), or None for the teacher itself; it acts for t in the closed interval. One
    call of twice the batch.
    """
    if guidance is None:
        return teacher

    def u(x, t, y=None):
        if y is None:
            return teacher(x, t)  # both halves are the null label's
        t, null = t.expand(len(y)), torch.full_like(y, teacher.num_classes)
        with_label, without = teacher(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null])).chunk(2)
        gamma = torch.where((interval[0] <= t) & (t <= interval[1]), guidance, 1.0)
        return without + expand(gamma, x) * (with_label - without)

    return u


EVALUATIONS = {"euler": 1, "heun": 2, "rk4": 4}  # of u, a step


def ode_step(u, x, t, h, method="heun", y=None):
    """One step of dx/d(delta) = u from time t to t - h. t, h: (B,) or (1,). Raises ValueError."""
    k1 = u(x, t, y)
    if method == "euler":
        return x + expand(h, x) * k1
    if method == "heun":
        k2 = u(x + expand(h, x) * k1, t - h, y)
        return x + expand(h, x) / 2 * (k1 + k2)
    if method == "rk4":
        k2 = u(x + expand(h, x) / 2 * k1, t - h / 2, y)
        k3 = u(x + expand(h, x) / 2 * k2, t - h / 2, y)
        k4 = u(x + expand(h, x) * k3, t - h, y)
        return x + expand(h, x) / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    raise ValueError(f"unknown method {method}: choose from {', '.join(EVALUATIONS)}")


@torch.no_grad()
def solve_ode(u, z, steps, method="heun", y=None, return_path=False, t=None, h=None):
    """Sample the teacher, from z at t = 1 to t = 0, in steps * EVALUATIONS[method] evaluations of u; or
    follow it over a stretch, from states z at times t to times t - h, both (B,).

    Returns phi(z, 1), or where the stretch ends, shaped as z; with return_path all states on the way, which
    are phi(z, i / steps), (steps + 1, B, C, H, W). Raises ValueError.
    """
    if steps < 1:
        raise ValueError(f"solve_ode needs at least one step, not {steps}")
    path, t, h = [z], *(z.new_ones(1) if v is None else v for v in (t, h))
    for i in range(steps):
        x = ode_step(u, path[-1], t - i * (h / steps), h / steps, method, y)
        path = [*path, x] if return_path else [x]
    return torch.stack(path) if return_path else path[-1]


# Pretrained teachers. SiT (arXiv 2401.08740) and REPA (arXiv 2410.06940) are DiTs with these tensor names.
# What differs is folded into their weights, so that nothing else has to know where a teacher came from.

RELEASED = {  # --teacher NAME: the file's name, and where its authors keep it
    "sit-xl/2-256": ("SiT-XL-2-256x256.pt", "https://www.dl.dropboxusercontent.com/scl/fi/"
                     "as9oeomcbub47de5g4be0/SiT-XL-2-256.pt?rlkey=uxzxmpicu46coq3msb17b9ofa&dl=0"),
    "repa-xl/2-256": ("REPA-SiT-XL-2-256x256.pt", "https://www.dl.dropboxusercontent.com/scl/fi/"
                      "cxedbs4da5ugjq5wg3zrg/last.pt?rlkey=8otgrdkno0nd89po3dpwngwcc&st=apcc645o&dl=0"),
}
SIZES = ["hidden_size", "depth", "num_heads", "patch_size"]  # fields of Config that a teacher decides
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # of S, B, L, XL, by their width: files do not tell


def released(name):
    """The path of a teacher of RELEASED, downloaded into torch.hub's folder if it is not there. Raises
    UserError."""
    file, url = RELEASED[name]
    path = Path(torch.hub.get_dir(), "checkpoints", file)
    if rank() == 0 and not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path))
        except OSError as e:
            raise UserError(f"--teacher {name} cannot be downloaded ({e}): go online, or fetch its file by "
                            "hand and give --teacher FILE") from e
    wait_for_all()
    return path


def from_public(file, path, form=""):
    """What a SiT or REPA file holds, in our convention: its format, the settings of a DiT, the tensors.

    file: a state dict, or the dict of a training script, of which "ema" is taken; form: "sit", "repa" or "",
    which reads it off the tensors: SiT has twice as many output channels, of which the second half is unused,
    REPA has projectors. Raises UserError for files that are neither, or do not tell which.
    """
    source = file.get("ema") or file.get("model") or file
    tensors = {k.removeprefix("module."): v for k, v in source.items()} if isinstance(source, dict) else {}
    of_repa = any(k.startswith(("projectors.", "decoder_blocks.")) for k in tensors)
    tensors = {k: v for k, v in tensors.items() if not k.startswith("projectors.")}
    ndim = {"x_embedder.proj.weight": 4, "pos_embed": 3, "y_embedder.embedding_table.weight": 2,
            "blocks.0.attn.qkv.weight": 2, "final_layer.linear.weight": 2, "final_layer.linear.bias": 1}
    bad = [k for k, n in ndim.items() if getattr(tensors.get(k), "ndim", None) != n]
    if getattr(tensors.get("t_embedder.mlp.0.weight"), "shape", (0,))[-1] != 256:
        bad.append("t_embedder.mlp.0.weight")
    if bad:
        raise UserError(f"{path} is not a teacher written by fmd, and as one of SiT or REPA it has tensors "
                        f"missing or of a wrong shape: {', '.join(bad)}. Give another file")
    n = 1 + max(int(k.split(".")[1]) for k in tensors if k.startswith("blocks."))
    for k in [k for k in tensors if k.startswith("decoder_blocks.")]:  # how older files of REPA name the rest
        _, i, rest = k.split(".", 2)
        tensors[f"blocks.{int(i) + n}.{rest}"] = tensors.pop(k)
    depth = 1 + max(int(k.split(".")[1]) for k in tensors if k.startswith("blocks."))
    D, C, p, _ = tensors["x_embedder.proj.weight"].shape
    args = vars(file["args"]) if isinstance(file.get("args"), argparse.Namespace) else {}
    prediction, path_type = (str(args.get(k, "")) for k in ("prediction", "path_type"))
    if prediction not in ("", "velocity", "v") or path_type.lower() not in ("", "linear"):
        raise UserError(f"{path} was trained with prediction {prediction} and path type {path_type}: give "
                        "one that predicts velocities of the linear path")
    of_sit = len(tensors["final_layer.linear.weight"]) == 2 * C * p * p
    sit = of_sit or form == "sit" or prediction == "velocity"
    repa = of_repa or form == "repa" or prediction == "v"
    if sit == repa:
        what = "has marks of both SiT and REPA" if sit else "does not tell SiT from REPA"
        raise UserError(f"{path} {what}, which differ in sign and time: give the right --teacher-format")
    last = ["final_layer.linear.weight", "final_layer.linear.bias"]
    if sit:  # its time is 1 - t, and cos w(1 - t) = cos w cos wt + sin w sin wt, the sine likewise
        w = torch.exp(-math.log(10000) / 128 * torch.arange(128, dtype=torch.float64))
        of_cos, of_sin = tensors["t_embedder.mlp.0.weight"].double().split(128, 1)
        tensors["t_embedder.mlp.0.weight"] = torch.cat(
            [of_cos * w.cos() + of_sin * w.sin(), of_cos * w.sin() - of_sin * w.cos()], 1)
        for k in last if of_sit else []:
            tensors[k] = tensors[k][torch.arange(len(tensors[k])) % (2 * C) < C]
    else:
        for k in last:  # its velocity points from data to noise
            tensors[k] = -tensors[k]
    norm = tensors.get("blocks.0.attn.q_norm.weight")
    heads = HEADS.get(D, max(1, D // 64)) if norm is None else D // len(norm)
    side = p * math.isqrt(tensors["pos_embed"].shape[1])
    classes = len(tensors["y_embedder.embedding_table.weight"]) - 1
    return dict(format="SiT" if sit else "REPA", ema=tensors, network=dict(
        input_size=side, in_channels=C, num_classes=classes, hidden_size=D, depth=depth, num_heads=heads,
        patch_size=p, qk_norm=norm is not None))


# ------------------------------------------------------------------------------------------------------------
# 5. Distillation
# The paper. A student f(z, delta) = z + delta F(z, delta) is to become the teacher's flow map from the prior.
# Two velocities of it are compared with the teacher's u: the generating velocity, d f / d delta (prediction),
# and the noising velocity, that of its own samples with noise put back (correction). Both begin with
# z ~ N(0, I) alone.


class FlowMap(DiT):
    """The student: a DiT read as the average velocity F(z, delta) between the prior and t = 1 - delta.

    With the teacher's weights it begins as F(z, delta) = u(z, 1 - delta). Only a rival's paths, MeanFlow's,
    begin elsewhere than in the prior: there z is a state at the time `start_time`.
    """

    def forward(self, z, delta, y=None, guidance=None, start_time=None):
        return super().forward(z, (1 if start_time is None else start_time) - delta, y, guidance, start_time)

    def map(self, z, delta, y=None, guidance=None, start_time=None):
        """f(z, delta) = z + delta F(z, delta); f(z, 0) = z whatever the weights."""
        return z + expand(delta, z) * self(z, delta, y, guidance, start_time)


def squared_norm(D):
    """||D||^2 / d of each sample, (B,)."""
    return D.flatten(1).square().mean(1)


@torch.no_grad()
def prediction_gradient(student, u, z, delta, y=None, guidance=None, form="jvp", h=0.005, F=None,
                        ema=None, steps=1):
    """Predict: D_G = v_G - u(f, 1 - delta) [9], v_G = d f / d delta being the student's generating velocity.

    D_G is constant, shaped as z, and 0 for all z and delta if and only if f is the teacher's flow map, up to
    the error of a difference or of a step.
    F: F(z, delta) if it is known already. Raises ValueError for any form but these three, which agree as h, a
    number or (B,), goes to 0:
        jvp         v_G = F + delta dF/ddelta [7], by forward-mode differentiation
        difference  the same, dF/ddelta being a difference between delta - h and delta + h
        step        over the stretch from delta - h to delta: what the student says, less what RK4 steps of
                    the teacher make of the student's own f(z, delta - h), over h; `ema`, the student with
                    averaged, less noisy weights, says f(z, delta - h) in its place if it is given
    """
    F = student(z, delta, y, guidance) if F is None else F
    f, h = z + expand(delta, z) * F, torch.as_tensor(h, device=z.device).expand_as(delta)
    if form == "step":
        begin = (ema or student).map(z, delta - h, y, guidance)
        end = solve_ode(u, begin, steps, "rk4", y, t=1 - delta + h, h=h)
        return (f - end) / expand(h, z)
    if form == "jvp":
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward-mode derivative
            one, delta = torch.ones_like(delta), delta.contiguous()  # jvp refuses an expanded delta
            dF = torch.func.jvp(lambda d: student(z, d, y, guidance), (delta,), (one,))[1]
    elif form == "difference":
        low, high = (delta - h).clamp(min=0), (delta + h).clamp(max=1)
        dF = (student(z, high, y, guidance) - student(z, low, y, guidance)) / expand(high - low, z)
    else:
        raise ValueError(f"unknown form {form}: choose from jvp, difference, step")
    return F + expand(delta, z) * dF - u(f, 1 - delta, y)


@torch.no_grad()
def correction_gradient(v_N, u, x_r, r, y=None):
    """Correct: D_N = v_N(x_r, r) - u(x_r, r) [11], v_N the velocity of the student's noised samples x_r.

    F(z, 1)^T D_N has the gradient of an integral over r of KL(student's noised law || teacher's) [10].
    Returns a constant shaped as x_r.
    """
    return v_N - u(x_r, r, y)


def decayed(D, config):
    """D / (||D||^2 / d + eps)^k, sample by sample."""
    return D / expand((squared_norm(D) + config.eps) ** config.decay, D)


class Distiller(nn.Module):
    """Prediction, correction and the critic's own loss as one scalar. forward(batch) -> loss, figures.

    student: FlowMap; critic: DiT, which learns v_N online; teacher: called as u(x, t, y), never changed.
    lambda follows ||D_G|| before its decay, so that the correction fades as the prediction succeeds.
    draw(step) -> batch, what draw_prior makes: first the samples that predict and then those that correct.
    """

    def __init__(self, student, critic, teacher, config):
        super().__init__()
        self.network, self.critic, self.teacher, self.config = student, critic, teacher, config
        self.ema = None  # the network's average, for config.ema_target: TrainState puts it here
        # E||D_G||, E||D_N|| of the step before, over all processes and micro-batches: train() keeps them
        self.register_buffer("norm_G", torch.zeros(()))
        self.register_buffer("norm_N", torch.zeros(()))

    def forward(self, batch):
        c, split = self.config, len(batch["h"])  # of the groups, the first `split` predict
        inputs = batch["z"], batch["delta"], batch["y"], batch.get("guidance")
        F = self.network(*inputs)  # one call for all: the samples that correct have delta = 1
        first, rest = self.halves(F, inputs, split)
        loss, figures = 0.0, {}
        if split:
            loss, figures["norm_G"], figures["prediction"] = self.predict(*first, batch["h"])
        if len(batch["r"]):
            correction, critic, figures["norm_N"], figures["correction"] = self.correct(
                *rest, batch["r"], batch["n"])
            balance = c.alpha * self.norm_G / (self.norm_N + c.eps)  # lambda
            if not split:
                balance = torch.full_like(balance, c.alpha)  # nothing to be balanced with
            loss = loss + balance * correction + critic
            figures.update({"critic": critic.detach(), "lambda": balance})
        return loss, figures

    def draw(self, step):
        return draw_prior(self.network.shape, self.network.num_classes, self.config, step)

    @staticmethod
    def halves(F, inputs, split):
        """F and the inputs z, delta, y, guidance, of the first `split` groups and of the others."""
        return zip(*((v, v) if v is None else v.tensor_split([split * len(v) // len(inputs[1])])
                     for v in (F, *inputs)))

    def predict(self, F, z, delta, y, guidance, h):
        c, u = self.config, guided(self.teacher, guidance, self.config.guidance_interval)
        D_G = prediction_gradient(self.network, u, z, delta, y, guidance, c.prediction, h, F, self.ema,
                                  c.step_count)
        size = squared_norm(D_G)
        if c.prediction == "step":
            D_G = expand(h / delta, D_G) * D_G  # (f - end) / delta: what F itself is off by
        return (F * decayed(D_G, c)).mean(), size.sqrt().mean(), size.mean()

    def correct(self, F, z, delta, y, guidance, r, n):
        x = (z + F).detach()  # f(z, 1), the student's samples
        x_r = noised(x, n, r)
        v_N = self.critic(x_r, r, y, guidance)
        critic = (v_N - (x - n)).square().mean()  # flow matching, on the student's samples
        u = guided(self.teacher, guidance, self.config.correction_interval)
        D_N = correction_gradient(v_N, u, x_r, r, y)
        return (F * D_N).mean(), critic, squared_norm(D_N).sqrt().mean(), squared_norm(D_N).mean()


def make_teacher(start, config, strength=None):
    """What is distilled: the network `start`, or its toy's closed form; guided if there is a strength."""
    teacher = start
    if config.exact_teacher:
        toy = TOYS[config.toy]
        k = torch.arange(toy.num_classes)
        teacher = ExactTeacher(toy.skeleton(k, torch.zeros(len(k), 2)), torch.full((len(k),), toy.blur))
    return guided(teacher.to(start.pos_embed.device), strength, config.guidance_interval)


def make_distiller(start, config, data=None):
    """The loss of config.method. Student and critic begin with the weights of `start`; only meanflow needs
    data."""
    teacher = make_teacher(start, config)
    student = FlowMap.from_teacher(start, config.is_guided, config.method == "meanflow")
    if config.method == "regression":
        return Regression(student, teacher, config)
    if config.method == "meanflow":
        return MeanFlow(student, teacher, data, config).to(start.pos_embed.device)
    critic = DiT.from_teacher(start, config.is_guided) if config.corrections else None
    return Distiller(student, critic, teacher, config).to(start.pos_embed.device)


def share(batch, part, parts):
    """Piece `part` of `parts` of a batch: as much of what predicts and of what corrects in each."""
    if parts == 1:
        return batch
    split = len(batch["h"]) / len(batch["delta"]) if "h" in batch else 1

    def piece(name, v):
        cut = len(v) if name in ("h", "r", "n") else round(len(v) * split)
        return torch.cat([half.tensor_split(parts)[part] for half in (v[:cut], v[cut:])])

    return {name: piece(name, v) for name, v in batch.items()}


def draw_noise(shape, num_classes, config, n, g):
    """n noises z, and a label and a guidance strength for each group of them."""
    c, groups = config, n // config.group_size
    y = torch.randint(max(num_classes, 1), (groups,), generator=g)
    y = torch.where(torch.rand(groups, generator=g) < c.label_dropout, num_classes, y)
    batch = dict(z=torch.randn(n, *shape, generator=g), y=y)
    if c.is_guided:
        strength = torch.rand(groups, generator=g)
        batch["guidance"] = c.guidance_min + (c.guidance_max - c.guidance_min) * strength
    return batch


def draw_prior(shape, num_classes, config, step):
    """The student's batch of a step: noise z, labels y, times. There is no data here.

    delta is 1 for the samples that correct, which come last, and at the end of config.end_share of the
    stretches (a derivative learns worse with a share there). h (lengths of stretches) is for samples that
    predict, r and n (times and noise to be put back) for those that correct. Times, labels and strengths are
    one for config.group_size samples in a row.
    """
    c, g = config, generator(config.seed, STUDENT, step)
    m = c.corrections // c.group_size  # groups that correct
    p = c.batch_size // c.group_size - m  # groups that predict
    batch = draw_noise(shape, num_classes, c, c.batch_size, g)
    q = p - round(c.end_share * p) if c.prediction == "step" else p  # of these not at the end
    uniform = (torch.arange(q) + torch.rand(q, generator=g)) / max(q, 1)  # one in each of even parts
    delta = (1 - uniform**c.delta_power).clamp(min=1e-3)  # nearer to 0 a difference has no digits left
    delta = torch.cat([torch.ones(p - q), delta])
    edges = [1 - t for t in c.guidance_interval if c.is_guided and 0 < t < 1]  # u jumps there: go aside
    for edge in edges:
        gap = c.difference_size + 1e-4
        aside = (edge + gap * (delta - edge).sign()).clamp(1e-3, 1)
        delta = torch.where((delta - edge).abs() < gap, aside, delta)
    h = torch.full_like(delta, c.difference_size)
    if c.prediction == "step":
        h = torch.minimum(c.step_size * (0.5 + 0.5 * torch.rand(p, generator=g)), delta)
        for edge in edges:  # a stretch begins behind it
            h = torch.where((delta - h < edge) & (edge < delta), delta - edge - 1e-4, h)
    batch["delta"], batch["h"] = torch.cat([delta, torch.ones(m)]), h
    batch["r"] = torch.sigmoid(c.r_location + c.r_scale * torch.randn(m, generator=g))
    batch["n"] = torch.randn(c.corrections, *shape, generator=g)
    return batch


def evaluations_per_step(config):
    """Teacher evaluations of a step of distillation, one a sample and call; guided ones count twice."""
    form = EVALUATIONS["rk4"] * config.step_count if config.prediction == "step" else 1
    return ((config.batch_size - config.corrections) * form + config.corrections) * (1 + config.is_guided)


class Regression(nn.Module):
    """A rival: regress F(z, 1) on phi(z, 1) - z over pairs that are solved before the training, as many as
    cost what distillation would ask of the teacher. forward(batch) -> loss, figures; draw(step) -> batch."""

    def __init__(self, student, teacher, config):
        super().__init__()
        self.network, self.config, m = student, config, config.group_size
        evaluations = 8 * EVALUATIONS["rk4"] * (1 + config.is_guided)  # a pair; 8 steps end within 0.003
        n = max(1, evaluations_per_step(config) * config.steps // evaluations // m) * m
        pairs = draw_noise(student.shape, student.num_classes, config, n, generator(config.seed, PAIRS))
        self.z, self.y, self.guidance = (v if v is None else v.to(student.pos_embed.device)
                                         for v in (pairs["z"], pairs["y"], pairs.get("guidance")))
        ends, size = [], max(1, config.eval_batch_size // m)  # groups at a time
        for i in range(0, len(self.y), size):
            z, y = self.z[i * m:(i + size) * m], self.y[i:i + size]
            strength = None if self.guidance is None else self.guidance[i:i + size]
            ends.append(solve_ode(guided(teacher, strength, config.guidance_interval), z, 8, "rk4", y))
        self.phi = torch.cat(ends)

    def draw(self, step):
        g, n = generator(self.config.seed, STUDENT, step), self.config.batch_size // self.config.group_size
        return dict(groups=torch.randint(len(self.y), (n,), generator=g))

    def forward(self, batch):
        groups, m = batch["groups"], self.config.group_size
        z, phi = (v.unflatten(0, (-1, m))[groups].flatten(0, 1) for v in (self.z, self.phi))
        guidance = None if self.guidance is None else self.guidance[groups]
        F = self.network(z, torch.ones(len(groups), device=z.device), self.y[groups], guidance)
        D = F.detach() - (phi - z)
        return (F * decayed(D, self.config)).mean(), {"prediction": squared_norm(D).mean()}


@torch.no_grad()
def meanflow_gradient(student, u, x, delta, t, y=None, guidance=None, form="jvp", h=0.005, F=None,
                      ema=None, steps=1):
    """D = F + delta dF - u(x, t) of the MeanFlow identity (arXiv 2505.13447), at states x of the times
    t, (B,). Unlike in D_G [9] the end of a path is held while its start moves, and x with it: dF is the
    derivative along (-u, 1, 1) in (x, delta, t); and u is asked at x, which is given, not at f.

    Arguments, forms and errors as in prediction_gradient.
    """
    F = student(x, delta, y, guidance, t) if F is None else F
    h = torch.as_tensor(h, device=x.device).expand_as(delta)
    if form == "step":
        end = solve_ode(u, x, steps, "rk4", y, t=t, h=h)
        rest = (ema or student).map(end, delta - h, y, guidance, t - h)
        return (x + expand(delta, x) * F - rest) / expand(h, x)
    v, one = u(x, t, y), torch.ones_like(delta)

    def at(x, delta, t):
        return student(x, delta, y, guidance, t)

    if form == "jvp":
        with sdpa_kernel(SDPBackend.MATH):  # and contiguous: as in prediction_gradient
            dF = torch.func.jvp(at, (x, delta.contiguous(), t.contiguous()), (-v, one, one))[1]
    elif form == "difference":
        move = expand(h, x) * v
        dF = (at(x - move, delta + h, t + h) - at(x + move, delta - h, t - h)) / expand(2 * h, x)
    else:
        raise ValueError(f"unknown form {form}: choose from jvp, difference, step")
    return F + expand(delta, x) * dF - v


class MeanFlow(nn.Module):
    """A rival that needs data: the MeanFlow identity of the teacher's paths at noised data. It is right where
    it looks; where the teacher goes it looks only if the data is what the teacher generates.
    forward(batch) -> loss, figures; draw(step) -> batch."""

    def __init__(self, student, teacher, data, config):
        super().__init__()
        self.network, self.teacher, self.data, self.config = student, teacher, data, config
        self.ema = None  # as in Distiller

    def draw(self, step):
        c, g, null = self.config, generator(self.config.seed, STUDENT, step), self.data.num_classes
        batch = draw_noise(self.data.shape, null, c, c.batch_size, g)
        batch["x"], y = self.data.draw(c.batch_size, g, c.group_size)
        batch["y"] = torch.where(batch["y"] == null, null, y)
        n = len(y)
        end = ((torch.arange(n) + torch.rand(n, generator=g)) / n) ** c.delta_power  # as in draw_prior
        start_time = end + (1 - end) * torch.rand(n, generator=g)
        batch["delta"] = (start_time - end).clamp(min=1e-3)
        batch["start_time"], batch["h"] = end + batch["delta"], torch.full_like(end, c.difference_size)
        if c.prediction == "step":
            longest = c.step_size * (0.5 + 0.5 * torch.rand(n, generator=g))
            batch["h"] = torch.minimum(longest, batch["delta"])
        return batch

    def forward(self, batch):
        c, delta, start_time, y, guidance = self.config, *(
            batch.get(name) for name in ("delta", "start_time", "y", "guidance"))
        x = noised(batch["x"], batch["z"], start_time)
        F, u = self.network(x, delta, y, guidance, start_time), guided(self.teacher, guidance)
        D = meanflow_gradient(self.network, u, x, delta, start_time, y, guidance, c.prediction, batch["h"], F,
                              self.ema, c.step_count)
        size = squared_norm(D).mean()
        if c.prediction == "step":
            D = expand(batch["h"] / delta, D) * D
        return (F * decayed(D, c)).mean(), {"prediction": size}


# ------------------------------------------------------------------------------------------------------------
# 6. Training
# One loop for both stages. It owns no files: whoever iterates it logs, saves and stops.


class TrainState:
    """What training has reached: weights, their average, optimizer, step."""

    def __init__(self, module, config):
        self.module, self.config, self.step = module, config, 0
        self.networks = {"model": module.network}
        if getattr(module, "critic", None) is not None:
            self.networks["critic"] = module.critic
        matrices, groups = [], [dict(params=[], peak=config.learning_rate)]
        for name, p in module.network.named_parameters():
            is_matrix = config.optimizer == "muon" and ".mlp.fc" in name and p.ndim == 2
            (matrices if is_matrix else groups[0]["params"]).append(p)
        if "critic" in self.networks:
            groups.append(dict(params=list(module.critic.parameters()), peak=config.critic_learning_rate))
        adamw = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        self.optimizers = {"adamw": adamw}
        if matrices:  # with updates of AdamW's size, so that one learning rate serves both
            self.optimizers["muon"] = torch.optim.Muon(
                [dict(params=matrices, peak=config.learning_rate)], weight_decay=0.0, ns_steps=3,
                adjust_lr_fn="match_rms_adamw")
        self.ema = copy.deepcopy(module.network).requires_grad_(False)
        if config.ema_target and hasattr(module, "ema"):
            module.ema = self.ema
        self.parts = {**self.networks, "ema": self.ema, **self.optimizers}
        self.parameters = {name: list(part.parameters()) for name, part in self.parts.items()
                           if isinstance(part, nn.Module)}  # to walk through modules takes time

    def fit_to_machine(self):
        """Have the networks recompute their activations, or be compiled, as config says."""
        for network in self.networks.values():
            network.activation_checkpointing = self.config.activation_checkpointing
        asked = [getattr(self.module, name, None) for name in ("teacher", "ema")]
        for network in [*self.networks.values(), *asked]:
            if self.config.compile and isinstance(network, nn.Module):
                network.compile()

    def clip(self):
        """Clip the gradients, network by network; returns the sum of their norms before."""
        limit = self.config.clip
        return sum(nn.utils.clip_grad_norm_(self.parameters[name], limit) for name in self.networks)

    @torch.no_grad()
    def update(self):
        """A step of the optimizers. ema becomes ema + (1 - decay) (weights - ema), with less decay at first,
        when it is near the first weights."""
        for optimizer in self.optimizers.values():
            optimizer.step()
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.parameters["ema"], self.parameters["model"], 1 - decay)

    def set_learning_rates(self):
        """The peak, times a linear rise, times a linear fall that would reach 0 one step after the last."""
        rise, fall = min(1, (self.step + 1) / max(self.config.warmup, 1)), 1 - self.step / self.config.steps
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rise * fall

    def checkpoint(self):
        return {"step": self.step, "buffers": dict(self.module.named_buffers(recurse=False)),
                **{name: part.state_dict() for name, part in self.parts.items()}}

    def restore(self, checkpoint):
        """Undo checkpoint(). Raises KeyError, ValueError or RuntimeError for one of another module."""
        self.step = checkpoint["step"]
        peaks = [group["peak"] for optimizer in self.optimizers.values() for group in optimizer.param_groups]
        for name, part in self.parts.items():
            part.load_state_dict(checkpoint[name])
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["peak"] = peaks.pop(0)  # which may be lower than those that were saved
        for name, buffer in self.module.named_buffers(recurse=False):
            buffer.copy_(checkpoint["buffers"][name])


def rank():
    """The number of this process among those that torchrun started, otherwise 0, which writes the files."""
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def world_size():
    """How many processes train together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def wait_for_all():
    """Go on when all processes are here."""
    if world_size() > 1:
        distributed.barrier()


def mean_over_processes(v):
    """The mean of a tensor over all processes, the same in each."""
    if world_size() > 1:
        distributed.all_reduce(v)
        v /= world_size()
    return v


def micro_batches(config, world, name="--batch-size"):
    """Into how many pieces each of `world` processes cuts its share of a batch: the fewest that keep to
    config.micro_batch_size, all alike, so that a mean over pieces is one over the batch. Raises UserError."""
    size, limit, g = config.batch_size, config.micro_batch_size or math.inf, config.group_size
    corrects = config.correction_share if config.method == "prior" else 0

    def fewest(size):
        m = round(size * corrects / g)  # groups that correct
        return next((k for k in range(1, size // (g * world) + 1)
                     if m % (world * k) == (size // g - m) % (world * k) == 0
                     and size / (world * k) <= limit), None)

    if fewest(size) is None:
        other = next((n for n in range(size, 8 * world * size, g) if fewest(n)), None)
        raise UserError(f"{name} {size} cannot be dealt evenly to {world} processes in pieces of at most "
                        f"{limit}, what predicts and what corrects: give a larger --micro-batch-size"
                        f"{f' or {name} {other}' if other else ''}", 2)
    return fewest(size)


def train(module, draw, config, state=None):
    """Train module.network (and module.critic) from state.step to config.steps.

    module(batch) -> scalar loss, dict of figures; draw(step) -> dict of tensors. A generator: yields (step,
    figures, state) after every step, counted from 1; state.ema is the averaged network.
    Every process draws the whole batch and takes its share; losses, gradients and figures are means over
    processes and micro-batches. Figures with the name of one of the module's own buffers are kept in it.
    A step whose loss or gradient is not finite is left out, its figures are empty; ten of them in a row raise
    UserError.
    """
    state = state or TrainState(module, config)
    device, pieces = next(module.parameters()).device, micro_batches(config, world_size())
    parallel, buffers, left_out = module, dict(module.named_buffers(recurse=False)), 0
    if world_size() > 1:
        parallel = DistributedDataParallel(module, gradient_as_bucket_view=True)
    while state.step < config.steps:
        state.set_learning_rates()
        for optimizer in state.optimizers.values():
            optimizer.zero_grad()
        batch, sums = draw(state.step), []
        for i in range(pieces):
            piece = share(batch, rank() * pieces + i, world_size() * pieces)
            waits = world_size() > 1 and i < pieces - 1  # gradients are exchanged with the last piece only
            with parallel.no_sync() if waits else contextlib.nullcontext():
                with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
                    loss, figures = parallel({k: v.to(device) for k, v in piece.items()})
                (loss / pieces).backward()
            sums.append(torch.stack([loss.detach(), *figures.values()]))
        loss, *means = mean_over_processes(torch.stack(sums).mean(0)).unbind()
        norm, figures = state.clip(), dict(zip(figures, means))
        if math.isfinite(loss.item() + norm.item()):
            left_out = 0
            state.update()
        else:  # another batch may do better; one like it would come again with --resume
            left_out, figures = left_out + 1, {}
            if left_out == 10:
                raise UserError(f"step {state.step + 1}: loss {loss:.3g}, gradient {norm:.3g}: not finite, "
                                "the tenth in a row. --resume with a lower learning rate goes on")
        state.step += 1
        for name in buffers.keys() & figures.keys():
            buffers[name].copy_(figures[name])
        yield state.step, figures, state


@contextlib.contextmanager
def deferred_interrupts():
    """Within it Ctrl-C and SIGTERM only fill the list that it gives, so that a step is finished and saved."""
    received = []
    previous = {s: signal.signal(s, lambda number, frame: received.append(number))
                for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)


def save(path, write):
    """Have write(path) write a file that is there whole or not at all."""
    part = path.with_name(f"{path.stem}.part{path.suffix}")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_checkpoint(path, kind, form=""):
    """The dict that a stage saved; for a teacher also one made of a SiT or REPA file, see from_public. Raises
    UserError for anything but a whole file of this kind."""
    advice = f"give a {kind} written by fmd"
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # SiT and REPA keep their settings so
            checkpoint = torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError as e:
        raise UserError(f"there is no {path}: check the name, or train a {kind} first") from e
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as e:
        raise UserError(f"{path} cannot be read: it is cut off (if it was downloaded, delete it), no "
                        f"checkpoint, or holds pickled objects, which are never loaded; {advice}") from e
    if kind == "teacher" and isinstance(checkpoint, dict) and "kind" not in checkpoint:
        checkpoint = from_public(checkpoint, path, form)
        sizes = {k: checkpoint["network"][k] for k in SIZES}
        config = Config(**{"dataset": "imagenet", **PRESETS["imagenet"], **sizes})
        return dict(checkpoint, kind=kind, config=config, step=config.teacher_steps, seconds=None)
    if not isinstance(checkpoint, dict) or checkpoint.get("kind") != kind:
        raise UserError(f"{path} is not a {kind} written by fmd: give one that is")
    network = checkpoint.get("network")
    if isinstance(network, dict) and "start" in network:  # how older files call it
        network["start_time"] = network.pop("start")
    try:
        return {**checkpoint, "config": Config(**checkpoint["config"])}
    except (KeyError, TypeError, UserError) as e:
        raise UserError(f"{path} has settings that this version does not know: {e}; {advice} as it is") from e


def load_network(cls, checkpoint, path, device="cpu"):
    """The averaged network of a checkpoint, frozen. Raises UserError, naming tensors that do not fit."""
    try:
        with torch.device("meta"):
            expected, tensors = cls(**checkpoint["network"]).state_dict(), dict(checkpoint["ema"])
    except (KeyError, TypeError, ValueError, RuntimeError) as e:
        raise UserError(f"{path} does not describe its network ({e!r}): give a file written by fmd") from e
    shapes = [{k: getattr(v, "shape", None) for k, v in d.items()} for d in (expected, tensors)]
    bad = sorted(k for k in {**shapes[0], **shapes[1]} if shapes[0].get(k) != shapes[1].get(k))
    if bad:
        raise UserError(f"{path}: tensors missing, left over or of a wrong shape: {', '.join(bad[:5])}"
                        f"{' ...' if len(bad) > 5 else ''}. Give another file")
    return cls.from_tensors(checkpoint["network"], tensors).to(device).eval().requires_grad_(False)


def open_teacher(path, device="cpu", form=""):
    """The checkpoint of a teacher and its network; says in one line what was found. Raises UserError."""
    checkpoint = read_checkpoint(path, "teacher", form)
    network, s = load_network(DiT, checkpoint, path, device), checkpoint["network"]
    known, (C, H, W) = "format" not in checkpoint or s["qk_norm"] or s["hidden_size"] in HEADS, network.shape
    print(f"{path}: {checkpoint.get('format', 'fmd')}, {s['depth']} blocks of width {s['hidden_size']}, "
          f"{s['num_heads']} heads{'' if known else ' (a guess: width / 64)'}, patch {s['patch_size']}, "
          f"{'q/k normalised, ' * s['qk_norm']}samples {C} x {H} x {W}, {s['num_classes']} labels")
    return checkpoint, network


def load_teacher(path, device="cpu", form=""):
    """A DiT, called as u(x, t, y), from a teacher.pt (the average of its weights), or from a file of SiT or
    REPA; form: "sit" or "repa" for one that does not tell. Raises UserError."""
    return open_teacher(path, device, form)[1]


def load_student(path, device="cpu"):
    """A FlowMap from a student.pt: the average of its weights. Raises UserError."""
    return load_network(FlowMap, read_checkpoint(path, "student"), path, device)


def read_log(path):
    """The lines of metrics.jsonl as dicts, without one that a kill cut off."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return lines


def stage_config(kind, config):
    """The settings with which train() trains the teacher are those of the teacher's own."""
    c = config
    return c if kind == "student" else dataclasses.replace(
        c, steps=c.teacher_steps, learning_rate=c.teacher_learning_rate, batch_size=c.teacher_batch_size,
        correction_share=0.0)


def run_stage(kind, module, draw, config, out, resume=None, score=None, **extra):
    """Train with a progress bar, metrics.jsonl and out/<kind>.pt, from the checkpoint `resume` if given.

    score(network) -> endpoint error; extra goes into the checkpoint. Returns the last checkpoint. Ctrl-C and
    SIGTERM finish the step, save, and raise UserError with the command that goes on.
    """
    path, log_path, settings = out / f"{kind}.pt", out / "metrics.jsonl", dataclasses.asdict(config)
    config, writes = stage_config(kind, config), rank() == 0
    state, began = TrainState(module, config), time.perf_counter()
    state.fit_to_machine()
    if resume:
        try:
            state.restore(resume)
            began -= resume["seconds"]
        except (KeyError, TypeError, ValueError, RuntimeError) as e:
            raise UserError(f"{path} cannot be resumed ({e}): start anew with --overwrite") from e

    def keep():
        checkpoint = dict(kind=kind, config=settings, network=module.network.settings, versions=VERSIONS,
                          seconds=time.perf_counter() - began, **extra, **state.checkpoint())
        if writes:
            save(path, functools.partial(torch.save, checkpoint))
        return checkpoint

    # Lines of this stage past the checkpoint will come again.
    lines = [line for line in read_log(log_path) if line["stage"] != kind or line["step"] <= state.step]
    if writes:
        save(log_path, lambda p: p.write_text("".join(json.dumps(line) + "\n" for line in lines)))
    last, sums, shown = keep(), {}, {}  # before the first step: a folder that cannot be written is found now
    with deferred_interrupts() as interrupts, open(log_path if writes else os.devnull, "a") as log, tqdm(
        desc=kind, total=config.steps, initial=state.step, unit="step", dynamic_ncols=True,
        disable=None if writes else True
    ) as bar:
        for step, figures, _ in train(module, draw, config, state):
            stop = mean_over_processes(state.ema.pos_embed.new_full((), len(interrupts))) > 0  # all or none
            done, measured = bool(stop) or step == config.steps, {}
            for name, value in figures.items():
                sums.setdefault(name, []).append(value)
            if score and writes and not stop and (done or step % config.eval_interval == 0):
                measured["endpoint_error"] = score(state.ema)
            if done or measured or step % config.log_interval == 0:
                measured.update({name: torch.stack(values).mean().item() for name, values in sums.items()})
                shown, sums = {**shown, **measured}, {}
                line = dict(stage=kind, step=step, seconds=round(time.perf_counter() - began, 3), **measured)
                print(json.dumps(line), file=log, flush=True)
                bar.set_postfix({name: f"{value:.3g}" for name, value in shown.items()}, refresh=False)
            if done or step % config.checkpoint_interval == 0:
                last = keep()
            bar.update()
            if stop:
                launcher = f"torchrun --nproc_per_node={world_size()}" if world_size() > 1 else "python"
                raise UserError(f"interrupted; {path} is saved at step {step} of {config.steps}. Go on with: "
                                f"{launcher} fmd.py --out {out} --resume")
    print(f"{kind}: {config.steps} steps in {last['seconds']:.1f} s, {path}")
    return last


# ------------------------------------------------------------------------------------------------------------
# 7. Evaluation


def in_batches(size, f, z, y=None, dim=0):
    """f(z, y), computed `size` samples at a time: memory stays small, and caches are used."""
    labels = [None] * len(z) if y is None else y.split(size)
    return torch.cat([f(*pair) for pair in zip(z.split(size), labels)], dim)


@torch.no_grad()
def jump(student, z, y=None, guidance=None):
    """f(z, 1), the one-step samples of noises z (B, C, H, W), by one call. y, guidance: (B,), (1,), None."""
    return student.map(z, torch.ones(1, device=z.device), y, guidance)


def sample(student, n, y=None, guidance=None, generator=None):
    """n one-step samples, (n, C, H, W), by one call of the network. y, guidance: (n,), (1,) or None."""
    return jump(student, draw_z(student, n, generator), y, guidance)


def draw_z(network, n, generator=None):
    """Noise for n samples of a network, (n, C, H, W), drawn on the CPU: the same for all devices."""
    return torch.randn(n, *network.shape, generator=generator).to(network.pos_embed.device)


@torch.no_grad()
def student_path(student, z, points, y=None, guidance=None):
    """f(z, i / points) for i = 0 ... points, each a jump from z: (points + 1, B, C, H, W)."""
    return torch.stack([student.map(z, torch.full((1,), i / points, device=z.device), y, guidance)
                        for i in range(points + 1)])


def conditions(network, config, n):
    """What n samples or scores are conditioned on: labels in turn, (n,), or None; strength, (1,), or None."""
    y, device = None, network.pos_embed.device
    if config.score_labels and network.num_classes:
        y = torch.arange(n, device=device) % network.num_classes
    return y, None if config.strength is None else torch.full((1,), config.strength, device=device)


REWARDS = {  # of samples (B, C, H, W), (B,)
    "first": lambda x: x[:, 0].mean((1, 2)),  # how far to the right a point lies, how bright a picture is
    "symmetric": lambda x: -(x - x.flip(3)).square().mean((1, 2, 3)),  # of pictures: left against right
}


@torch.no_grad()
def search_noise(student, reward, n, y=None, guidance=None, generator=None, keep=1):
    """The `keep` noises of n whose one-step samples have the largest reward, best first: (keep, C, H, W).

    The paper's inference-time scaling: what the student finds in n evaluations is given to the teacher, whose
    sample of the same noise is nearly the same. reward: samples (n, C, H, W) -> (n,). y: (n,), (1,) or None.
    Raises ValueError.
    """
    if not 0 < keep <= n:
        raise ValueError(f"search_noise cannot keep {keep} of {n} noises")
    z = draw_z(student, n, generator)
    return z[reward(jump(student, z, y, guidance)).topk(keep).indices]


def search_table(student, start, config, reward, trials=64, budgets=(1, 2, 3, 5, 9)):
    """Reward against evaluations: the noise that the student ranked first, given to the teacher, beside the
    best of as many samples of the teacher as cost the same. reward: see search_noise. Returns the correlation
    of student's and teacher's rewards of the same noises, and a dict for each budget, which is counted in
    samples of the teacher. Raises UserError if the reward is the same for all samples."""
    c, steps = config, 16
    labels, strength = conditions(start, c, trials)
    u = make_teacher(start, c, strength)
    cost, g = steps * EVALUATIONS["heun"] * (1 + c.is_guided), generator(c.seed, SEARCH)
    batched = functools.partial(in_batches, c.eval_batch_size)

    def ends(z, y):
        return batched(lambda z, y: solve_ode(u, z, steps, "heun", y), z, y)

    most = max(budgets)
    z = draw_z(start, trials * most, g)
    y = None if labels is None else labels.repeat_interleave(most)
    rewards = reward(ends(z, y)).view(trials, most)
    if rewards.std() == 0:
        raise UserError("this reward is the same for all samples of this teacher: choose another --reward", 2)
    guesses = reward(batched(lambda z, y: jump(student, z, y, strength), z, y))
    same = torch.corrcoef(torch.stack([guesses, rewards.flatten()]))[0, 1].item()
    table = []
    for k in budgets:
        n = (k - 1) * cost  # what is left for the student when the teacher has drawn once
        best = z.view(trials, most, *start.shape)[:, 0]
        if n:
            ys = [None if labels is None else labels[i:i + 1] for i in range(trials)]
            best = torch.cat([search_noise(student, reward, n, y, strength, g) for y in ys])
        ranked, plain = reward(ends(best, labels)), rewards[:, :k].amax(1)
        table.append(dict(evaluations=k * cost, **{
            f"{kind}{what}": value for kind, v in (("student", ranked), ("teacher", plain))
            for what, value in (("", v.mean().item()), ("_error", v.std().item() / trials**0.5))}))
    return same, table


def search(student, start, config, out, name, trials=64):
    """search_table() for one of REWARDS, printed, and as search.json and search.png."""
    same, table = search_table(student, start, config, REWARDS[name], trials)
    print(f"reward '{name}', {trials} trials; student and teacher, same noises, correlate by {same:.3f}\n"
          "evaluations   ranked by the student, drawn by the teacher   best of the teacher's")
    for row in table:
        print(f"{row['evaluations']:11}   {row['student']:17.3f} ± {row['student_error']:.3f}"
              f"   {row['teacher']:31.3f} ± {row['teacher_error']:.3f}")
    save_figure(plot_search(table, name), out / "search.png")
    save(out / "search.json", lambda p: p.write_text(json.dumps(
        dict(reward=name, trials=trials, correlation=same, table=table, seed=config.seed), indent=1) + "\n"))


def relative_error(found, truth, reference=None):
    """sqrt(E||found - truth||^2 / E||s - mean s||^2), s being the reference or else the truth. 0 is exact; at
    1 the error is as wide as the reference."""
    s = truth if reference is None else reference
    return ((found - truth).square().mean() / (s - s.mean(0)).square().mean()).sqrt().item()


def error_along_path(found, truth):
    """Relative error at every delta of two paths (S, B, C, H, W), over the spread at the end: S numbers."""
    return [relative_error(a, b, truth[-1]) for a, b in zip(found, truth)]


def endpoint_error(student, teacher, z, y=None, guidance=None, steps=64, interval=(0.0, 1.0)):
    """Relative error of f(z, 1) against the teacher's phi(z, 1), found by `steps` RK4 steps. z (B, C, H, W).
    Its floor is 0, up to the error of the solver."""
    phi = solve_ode(guided(teacher, guidance, interval), z, steps, "rk4", y)
    return relative_error(jump(student, z, y, guidance), phi)


def sliced_w2(a, b, projections=128):
    """Sliced 2-Wasserstein distance of two sets of samples of one shape (N, ...): root mean square, over
    fixed random directions, of the distance between sorted projections. A direction of pictures
    (N, C, H, W) sees a random square of them, so that small features count as well. Raises ValueError.

    Two sets of one law are not 0 apart: their distance is the floor to compare with.
    """
    if a.shape != b.shape:
        raise ValueError(f"sliced_w2 needs two sets of one shape, not {tuple(a.shape)} and {tuple(b.shape)}")
    g, shape = generator(0), a.shape[1:]
    directions = torch.randn(shape.numel(), projections, generator=g)
    if len(shape) == 3:
        C, H, W = shape
        side = torch.randint(1, min(H, W) + 1, (projections,), generator=g)
        (top, left), window = torch.rand(2, projections, generator=g), []
        for length, corner in (H, top), (W, left):
            inside = torch.arange(length)[:, None] - (corner * (length - side + 1)).long()
            window.append((0 <= inside) & (inside < side))  # (length, projections)
        directions *= (window[0][:, None] & window[1]).flatten(0, 1).repeat(C, 1)
    directions = nnf.normalize(directions, dim=0).to(a)
    a, b = a.flatten(1), b.flatten(1)
    return ((a @ directions).sort(0)[0] - (b @ directions).sort(0)[0]).square().mean().sqrt().item()


def coverage(toy, x):
    """The share of points x (N, 2, 1, 1) outside the toy, and that of its emptiest part over what is its due.

    Outside is farther from the skeleton than 4 standard deviations of the blur, or than 0.07. A part is a
    cell, a mode, or a quarter of a curve, and has the points nearest to it. Data has about 0 and nearly 1.
    """
    line = torch.linspace(0, 1, 1024 if toy.blur else 33)
    v = torch.stack([line, line], 1) if toy.blur else torch.cartesian_prod(line, line)
    k, v = torch.arange(toy.num_classes).repeat_interleave(len(v)), v.repeat(toy.num_classes, 1)
    part = k * toy.arcs + (v[:, 0] * toy.arcs).long().clamp(max=toy.arcs - 1)
    near = [torch.cdist(chunk, toy.skeleton(k, v)).min(1) for chunk in x.flatten(1).cpu().split(1000)]
    outside = torch.cat([n.values for n in near]) > max(4 * toy.blur, 0.07)
    nearest = torch.cat([n.indices for n in near])[~outside]
    counts = part[nearest].bincount(minlength=toy.num_classes * toy.arcs)
    return dict(outside=outside.float().mean().item(), emptiest=(counts.min() * len(counts) / len(x)).item())


def evaluate(student, start, config, out, files, data=None, vae=None):
    """Figures into metrics.json, pictures beside it, all under conditions().

    start: the teacher's network; files: both checkpoints; data: as open_data gives it, or None to compare
    with the teacher only; vae: see as_pictures. metrics.json is written last: it says that a run is complete.
    """
    c, n, device, steps = config, config.eval_samples, start.pos_embed.device, config.solver_steps
    batched, (y, strength) = functools.partial(in_batches, c.eval_batch_size), conditions(start, c, n)
    u = make_teacher(start, c, strength)
    z = draw_z(start, 2 * n, generator(c.seed, EVALUATION, 1)).unflatten(0, (2, n))
    few = z[0, :c.eval_paths], None if y is None else y[:c.eval_paths]
    path = batched(lambda z, y: solve_ode(u, z, steps, "rk4", y, True), *few, dim=1)
    jumps = batched(lambda z, y: student_path(student, z, steps, y, strength), *few, dim=1)
    errors = error_along_path(jumps, path)
    ends, others = (batched(lambda z, y: solve_ode(u, z, 8, "rk4", y), noise, y) for noise in z)
    sets = {"teacher": ends, "student": batched(lambda z, y: jump(student, z, y, strength), z[0], y)}
    sw2, floor = sliced_w2(sets["student"], others), sliced_w2(ends, others)
    metrics = dict(
        endpoint_error=errors[-1], sw2=sw2, sw2_floor=floor, sw2_ratio=sw2 / floor, nfe=1,
        teacher_nfe=steps * EVALUATIONS["rk4"] * (1 + c.is_guided), guidance=c.strength,
        teacher_seconds=files["teacher"]["seconds"], student_seconds=files["student"]["seconds"],
        teacher_evaluations=evaluations_per_step(c) * files["student"]["step"], seed=c.seed,
        device=str(device), threads=torch.get_num_threads(), versions=VERSIONS,
        config=dataclasses.asdict(c), error_along_path=errors)
    if data:
        sets = {"data": data.draw(n, generator(c.seed, EVALUATION, 2))[0], **sets}
    if c.toy in TOYS:
        metrics["coverage"] = {name: coverage(TOYS[c.toy], x) for name, x in sets.items()}
    count = 8 * EVALUATIONS["rk4"] * (1 + c.is_guided)  # behind `ends`
    titles = {"teacher": f"teacher, {count} evaluations", "student": "student, 1 evaluation"}
    shown = 4000 if is_plane(z) else 40
    shown = {name: as_pictures(x[:shown], vae) for name, x in sets.items()}
    save_figure(plot_samples(shown, titles), out / "comparison.png")
    if not is_plane(z):
        several = 9 if vae else 36
        path, jumps = (torch.stack([as_pictures(x[:several], vae) for x in xs]) for xs in (path, jumps))
    save_figure(plot_paths(path, jumps) if is_plane(path) else plot_filmstrip(path, jumps), out / "paths.png")
    save_figure(plot_error({"student": errors}), out / "error.png")
    save_figure(plot_losses(read_log(out / "metrics.jsonl")), out / "losses.png")
    save_figure(animate_paths(path, jumps), out / "paths.gif")
    if c.is_guided:
        strengths = torch.linspace(c.guidance_min, c.guidance_max, 4, device=device)[:, None]
        noise = z[0, :400 if is_plane(z) else 6]
        labels = conditions(start, dataclasses.replace(c, score_labels=True), len(noise))[0]
        rows = [[solve_ode(make_teacher(start, c, gamma), noise, 8, "rk4", labels),
                 jump(student, noise, labels, gamma)] for gamma in strengths]
        pictures = (torch.stack([as_pictures(x, vae) for x in xs]) for xs in zip(*rows))
        figure = plot_guidance(*pictures, strengths.flatten().tolist())
        save_figure(figure, out / "guidance.png")
    save(out / "metrics.json", lambda p: p.write_text(json.dumps(metrics, indent=1) + "\n"))
    print(f"endpoint error {errors[-1]:.4f} of the spread; SW2 {sw2 / floor:.3f} times its floor {floor:.4f} "
          f"in 1 evaluation instead of {metrics['teacher_nfe']}")
    for name, found in metrics.get("coverage", {}).items():
        print(f"{name:>8}: {found['outside']:6.2%} outside the toy; "
              f"emptiest part {found['emptiest']:.2f} of its due")
    print(f"pictures and metrics.json are in {out}")


def forwards_needed(config):
    """What a step cannot do without, in forwards of one sample through the network: {part: number}. Backward
    passes count as two, a value with its derivative (JVP) as two; guidance doubles the teacher."""
    c, g, training = config, 1 + config.is_guided, 3 + config.activation_checkpointing
    stretch = EVALUATIONS["rk4"] * c.step_count
    target = {"step": 1 + stretch * g, "jvp": 2 + g, "difference": 2 + g}[c.prediction]
    return {"student": training * c.batch_size, "prediction": target * (c.batch_size - c.corrections),
            "correction": (g + training) * c.corrections}


def saved_bytes(network, *inputs):
    """Bytes that the backward pass of one call needs, without the network's own."""
    own, saved = {v.untyped_storage().data_ptr() for v in network.state_dict().values()}, {}

    def note(v):  # a storage counts once; what is noted is kept alive, so that no address comes twice
        saved[v.untyped_storage().data_ptr()] = v
        return v

    with torch.autograd.graph.saved_tensors_hooks(note, lambda v: v):
        network(*inputs)
    return sum(v.untyped_storage().nbytes() for place, v in saved.items() if place not in own)


def peak_memory(device):
    """GiB in use at the most: of a GPU since its statistics were reset, otherwise of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource  # not on Windows
    except ImportError:
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def seconds_of(device, *calls, least=1.0):
    """Median seconds of each call, after two to warm up: in turns, so that a noisy minute is everybody's, at
    least three times and for `least` seconds a call."""
    def clock(call):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    for call in calls * 2:
        call()
    times, total = [], torch.zeros((), device=device)
    while len(times) < 3 or total < least * len(calls):
        times.append([clock(call) for call in calls])
        total = mean_over_processes(total + sum(times[-1]))  # as often everywhere: calls may wait for all
    return np.median(times, 0).tolist()


def benchmark(start, config):
    """Print what distillation costs on this machine: parameters, memory, and for each form of the prediction
    the parts of a step and the whole of it, in seconds and in forwards, beside forwards_needed(). start: the
    teacher."""
    device, is_gpu = start.pos_embed.device, start.pos_embed.device.type == "cuda"
    low = config.precision == "bfloat16"
    z, one = draw_z(start, 2), torch.ones(2, device=device)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        start(z[:1], one[:1])  # fused attention would go uncounted on a CPU
    flops, network = counter.get_total_flops(), DiT.from_teacher(start)  # one that is trained
    with torch.autocast(device.type, torch.bfloat16, low):
        kept = saved_bytes(network, z, one) - saved_bytes(network, z[:1], one[:1])
    del network
    depth, tokens, count = len(start.blocks), start.pos_embed[0], sum(p.numel() for p in start.parameters())
    few = depth * tokens.numel() * 4 + kept / depth  # the inputs of all blocks, and one block's share
    held = 4 * count * (6 + 4 * (config.corrections > 0))  # teacher, average; 4 for who learns
    side = 8192 if is_gpu else 2048
    matrix = torch.randn(side, side, device=device, dtype=torch.bfloat16 if low else torch.float32)
    peak = 2 * side**3 / seconds_of(device, lambda: matrix @ matrix)[0]
    where = torch.cuda.get_device_name(device) if is_gpu else f"{device}, {torch.get_num_threads()} threads"
    print(f"{config.dataset} on {where}, processes: {world_size()}, torch {torch.__version__}, "
          f"{config.precision}{', compiled' * config.compile}\n"
          f"network: {count / 1e6:.1f} M parameters; a forward of one sample: {flops / 1e9:.3g} GFLOP\n"
          f"memory: networks and optimizer {held / 2**30:.3g} GiB; for the backward pass of a sample "
          f"{kept / 2**20:.3g} MiB, with --activation-checkpointing about {few / 2**20:.3g}\n"
          f"matrix product of side {side}: {peak / 1e12:.3g} TFLOP/s", flush=True)
    for form in "step", "jvp", "difference":
        try:
            benchmark_step(start, dataclasses.replace(config, prediction=form), flops, peak)
        except UserError as e:
            print(f"\n{e.args[0]}")


def benchmark_step(start, config, flops, peak):
    """benchmark()'s table for one form of the prediction. flops: of a forward; peak: FLOP/s at the best."""
    c = dataclasses.replace(config, steps=10**9, method="prior")
    device, world = start.pos_embed.device, world_size()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    distiller, pieces = make_distiller(start, c), micro_batches(c, world)
    state, draw = TrainState(distiller, c), distiller.draw
    state.fit_to_machine()
    steps = train(distiller, draw, c, state)
    batch = {k: v.to(device) for k, v in share(draw(0), 0, world * pieces).items()}  # the parts: of one piece
    inputs, autocast = [batch.get(k) for k in ("z", "delta", "y", "guidance")], functools.partial(
        torch.autocast, device.type, torch.bfloat16, c.precision == "bfloat16")
    with autocast(), torch.no_grad():
        F = distiller.network(*inputs)
    predicting, correcting = distiller.halves(F, inputs, len(batch["h"]))

    def forward():
        with autocast(), torch.no_grad():
            distiller.teacher(inputs[0], 1 - inputs[1], inputs[2])

    def student():
        with autocast():
            loss = distiller.network(*inputs).mean()
        loss.backward()

    def prediction():
        with autocast():
            distiller.predict(*predicting, batch["h"])

    def correction():
        with autocast():
            loss = distiller.correct(*correcting, batch["r"], batch["n"])[1]
        loss.backward()

    def update():
        state.clip()
        state.update()

    needed = {name: n / world for name, n in forwards_needed(c).items() if n}
    parts = {"student": student, "prediction": prediction, "correction": correction}
    whole, unit, *times = seconds_of(device, lambda: next(steps), forward, *map(parts.get, needed))
    unit /= len(inputs[0])  # one sample's forward
    others = zip(("optimizer", "noise"), seconds_of(device, update, lambda: draw(1)))
    rows = [*zip(needed, (t * pieces for t in times)), *others, ("the whole step", whole)]
    needed["the whole step"] = total = sum(needed.values())
    print(f"\n--prediction {c.prediction}, batch {c.batch_size}, pieces: {world * pieces}\n"
          f"{'':16}{'ms':>10}{'forwards':>10}{'needed':>8}{'ratio':>7}")
    for name, t in rows:
        print(f"{name:16}{1000 * t:10.1f}{t / unit:10.1f}"
              + (f"{needed[name]:8.0f}{t / unit / needed[name]:7.2f}" if name in needed else ""))
    print(f"{c.batch_size / whole:.3g} samples/s; {total * flops / whole / 1e12:.3g} TFLOP/s a process, "
          f"{total * flops / whole / peak:.0%} of the product's; peak memory {peak_memory(device):.2f} GiB"
          f"{'' if device.type == 'cuda' else ', so far'}")


# ------------------------------------------------------------------------------------------------------------
# 8. Plots
# One colour for one thing, everywhere. Each function returns a figure; save_figure writes and closes it.

COLORS = {"data": "#4d4d4d", "teacher": "#2166ac", "student": "#e08214", "critic": "#7b3294"}


def is_plane(x):
    """Whether x (..., C, H, W) are points of the plane, not pictures."""
    return x.shape[-2:] == (1, 1)


def panels(n, points, width, rows=1):
    """n square panels in a row with one view of the plane, which holds nearly all points (..., 2, 1, 1)."""
    figure, axes = plt.subplots(rows, n, figsize=(width * n, width * rows + 0.4), squeeze=False,
                                layout="constrained")
    limit = 1.15 * points.abs().flatten().quantile(0.999).item()
    for axis in axes.flat:
        axis.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[], yticks=[])
    return figure, axes.flatten()


def plane(x):
    """Points (N, 2, 1, 1) -> two arrays (N,)."""
    return x.flatten(1).cpu().numpy().T


def grid(x, columns):
    """Pictures (N, C, H, W) in [-1, 1], `columns` of them in a row -> one array for imshow."""
    x = make_grid(x.cpu(), columns, padding=1, normalize=True, value_range=(-1, 1), pad_value=1)
    return x.permute(1, 2, 0).numpy()


def strip(rows, titles=()):
    """Pictures in rows, [(name, (N, C, H, W))]; names in their colours at the left, titles over columns."""
    n, width = len(rows[0][1]), rows[0][1].shape[3] + 1
    size = max(0.8, width / 160)  # inches of a picture
    figure, axes = plt.subplots(len(rows), 1, figsize=(size * n + 0.9, size * len(rows) + 0.5), squeeze=False,
                                layout="constrained")
    for axis, (name, x) in zip(axes.flat, rows):
        axis.imshow(grid(x, n), interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        color = COLORS.get(name, "black")
        axis.set_ylabel(name, color=color, rotation=0, ha="right", va="center", fontsize=11)
    axes[0, 0].set_xticks(*[[(i + 0.5) * width for i in range(len(titles))], titles] if titles else [[]])
    axes[0, 0].tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    return figure


def plot_samples(samples, titles=None):
    """Sets of samples, {"data" | "teacher" | "student": (N, C, H, W)}. Points of the plane lie side by side;
    of pictures the first forty, ten a row, sets under each other: what is under each other has one noise."""
    first = next(iter(samples.values()))
    if not is_plane(first):
        figure = strip([(name, x[i:i + 10]) for i in range(0, min(len(first), 40), 10)
                        for name, x in samples.items() if name != "data" or i == 0])
        figure.suptitle("; ".join((titles or {}).get(name, name) for name in samples), fontsize=13)
        return figure
    figure, axes = panels(len(samples), torch.cat([x.cpu() for x in samples.values()]), 4)
    for axis, (name, x) in zip(axes, samples.items()):
        axis.scatter(*plane(x), s=3, linewidths=0, alpha=0.6, color=COLORS[name])
        axis.set_title((titles or {}).get(name, name), fontsize=13)
    return figure


def plot_filmstrip(teacher_path, student_path, titles=None, lines=4):
    """Pictures along the teacher's path and the student's f(z, delta) under them, (S, B, C, H, W): the first
    `lines` noises at nine even times, or at all S under titles of their own."""
    at = np.linspace(0, len(teacher_path) - 1, 9).round().astype(int)
    if titles is None:
        titles = [f"δ = {i / at[-1]:.2f}" for i in at]
        teacher_path, student_path = teacher_path[at], student_path[at]
    paths = {"teacher": teacher_path, "student": student_path}
    return strip([(name, path[:, i]) for i in range(min(lines, teacher_path.shape[1]))
                  for name, path in paths.items()], titles)


def plot_guidance(teacher, student, strengths):
    """Labelled samples at several strengths of guidance, a column each. teacher, student: (S, B, C, H, W)."""
    titles = [f"γ = {strength:.1f}" for strength in strengths]
    if not is_plane(teacher):
        return plot_filmstrip(teacher, student, titles)
    figure, axes = panels(len(titles), torch.cat([teacher, student]), 2.7, rows=2)
    for i, axis in enumerate(axes):
        name, column = ("teacher", "student")[i // len(titles)], i % len(titles)
        axis.scatter(*plane((teacher, student)[i // len(titles)][column]), s=4, lw=0, color=COLORS[name])
        axis.set_title(f"{name}, {titles[column]}", fontsize=11)
    return figure


def plot_paths(teacher_path, student_path, lines=40):
    """The teacher's paths and the student's f(z, delta) over them, (S, B, 2, 1, 1) from the same noises: the
    first `lines` of them, before all of the teacher's ends."""
    figure, (axis,) = panels(1, torch.cat([teacher_path[:, :lines], student_path[:, :lines]]), 7)
    axis.scatter(*plane(teacher_path[-1]), s=4, linewidths=0, color=COLORS["teacher"], alpha=0.15)
    for name, path, width, alpha in ("teacher", teacher_path, 4, 0.4), ("student", student_path, 1.2, 1):
        for i in range(min(lines, path.shape[1])):
            label = None if i else name
            axis.plot(*plane(path[:, i]), color=COLORS[name], lw=width, alpha=alpha, label=label)
        axis.scatter(*plane(path[-1, :lines]), s=18 * width, lw=0, color=COLORS[name], alpha=alpha, zorder=3)
    noise = plane(teacher_path[0, :lines])
    axis.scatter(*noise, s=28, color="white", edgecolors="black", zorder=4, label="noise z")
    axis.set_title("Teacher's ODE path and student's jumps f(z, δ), same noises", fontsize=13)
    axis.legend(loc="upper left", fontsize=11, framealpha=0.9)
    return figure


def plot_error(curves, title="How far the student is from the teacher's path"):
    """Errors over even steps of delta from 0 to 1. curves: {label: list}; "student" keeps its colour."""
    figure, axis = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    for label, errors in curves.items():
        axis.plot(np.linspace(0, 1, len(errors)), errors, lw=2.5, color=COLORS.get(label),
                  label=f"{label}, {errors[-1]:.4f} at δ = 1")
    axis.set(xlim=(0, 1), ylim=(0, None), title=title)
    axis.set(xlabel="δ: 0 is noise, 1 is data", ylabel="error / spread of the samples")
    axis.grid(alpha=0.3)
    axis.legend(loc="upper left")
    return figure


def plot_losses(lines):
    """The teacher's loss, the student's residuals and its endpoint error, from the lines of metrics.jsonl."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for axis, (title, stage, curves) in zip(axes, [
        ("Teacher: its loss", "teacher", {"flow_matching": ("flow matching", "teacher")}),
        ("Student: residuals ‖D‖²/d", "student", {"prediction": ("prediction", "student"),
                                                  "correction": ("correction", "critic")}),
        ("Student: distance from the teacher", "student", {"endpoint_error": ("endpoint error", "student")}),
    ]):
        for name, (label, color) in curves.items():
            points = [(line["step"], line[name]) for line in lines if line["stage"] == stage and name in line]
            axis.plot(*zip(*points) if points else ([], []), color=COLORS[color], label=label)
        axis.set(title=title, xlabel="step", yscale="log" if "residuals" in title else "linear")
        axis.grid(alpha=0.3, which="both")
        axis.legend()
    return figure


def plot_search(table, reward):
    """Reward, with its standard error, against evaluations: the table of search()."""
    figure, axis = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    labels = {"student": "ranked by the student, drawn by the teacher", "teacher": "best of the teacher's"}
    for kind, label in labels.items():
        columns = kind, f"{kind}_error", "evaluations"
        mean, error, cost = (np.array([row[k] for row in table]) for k in columns)
        axis.errorbar(cost, mean, error, lw=2.5, capsize=4, color=COLORS[kind], label=label)
    axis.set(xlabel="evaluations for a sample", ylabel=f"reward '{reward}'", xscale="log", xticks=cost,
             xticklabels=cost, title="What search buys")
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def animate_paths(teacher_path, student_path, frames=20):
    """Noise becoming data along both paths, (S, B, C, H, W): an animation that rests on its last frame. Of
    pictures it shows 36."""
    figure, axes = panels(2, torch.cat([teacher_path[-1:], teacher_path[:1]]), 3.6)
    paths = {"teacher, ODE up to": teacher_path, "student, one jump to": student_path}
    if is_plane(teacher_path):
        clouds = [axis.scatter([], [], s=4, lw=0, color=COLORS[name[:7]]) for axis, name in zip(axes, paths)]
    else:
        side = math.isqrt(min(36, teacher_path.shape[1]))
        clouds = [axis.imshow(grid(path[0, :side**2], side), extent=(*axis.get_xlim(), *axis.get_ylim()))
                  for axis, path in zip(axes, paths.values())]
    steps = np.linspace(0, len(teacher_path) - 1, frames).round().astype(int).tolist()

    def show(i):
        for axis, cloud, (name, path) in zip(axes, clouds, paths.items()):
            if is_plane(path):
                cloud.set_offsets(plane(path[i]).T)
            else:
                cloud.set_data(grid(path[i, :side**2], side))
            axis.set_title(f"{name} δ = {i / (len(path) - 1):.2f}")

    return FuncAnimation(figure, show, frames=steps + steps[-1:] * 5, init_func=lambda: None)


def save_figure(figure, path):
    """Write a figure as PNG or an animation as GIF, whole or not at all, and close it."""
    if isinstance(figure, FuncAnimation):
        save(path, lambda p: figure.save(p, writer=PillowWriter(fps=10), dpi=80))
    else:
        save(path, lambda p: figure.savefig(p, dpi=110))
    plt.close(getattr(figure, "_fig", figure))


# ------------------------------------------------------------------------------------------------------------
# 9. Command line

STAGE_FILES = {"all": ["teacher.pt", "student.pt"], "teacher": ["teacher.pt", "student.pt"],
               "distill": ["student.pt"], "sample": ["samples.npz", "samples.parts"],
               "evaluate": ["metrics.json"], "search": ["search.json"], "benchmark": []}
READING = ["sample", "evaluate", "search"]  # stages that read a student
FREE = {"threads", "log_interval", "eval_interval", "checkpoint_interval", "eval_batch_size", "guidance",
        "latents", "score_labels", "micro_batch_size", "activation_checkpointing", "compile",
        "learning_rate", "critic_learning_rate", "teacher_learning_rate"}
SHAPES = {"toy2d": ((2, 1, 1), 8), "mnist": ((1, 28, 28), 10), "cifar10": ((3, 32, 32), 10),
          "imagenet": ((4, 32, 32), 1000)}  # of samples, and the number of labels: what is benchmarked


def new_network(shape, num_classes, config):
    """A DiT of config's size; its first weights follow from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(config.seed, NETWORK).initial_seed())
        return DiT(shape[1], shape[0], num_classes, *(getattr(config, name) for name in SIZES))


def train_teacher(data, config, out, device, resume=None):
    """Stage 1: flow matching on the data. Returns the teacher's checkpoint."""
    network = new_network(data.shape, data.num_classes, config).to(device)
    draw = functools.partial(draw_data, data, config)
    return run_stage("teacher", FlowMatching(network), draw, config, out, resume)


def fingerprint(network):
    """A number that tells networks apart: a checksum of the last layer's weights."""
    return zlib.crc32(network.final_layer.linear.weight.detach().cpu().numpy().tobytes())


def train_student(start, config, out, teacher_file, resume=None, data=None):
    """Stage 2: distillation of `start` (or its closed form), from the prior alone unless the method is
    meanflow, which needs data. Returns the checkpoint."""
    c, distiller, n = config, make_distiller(start, config, data), max(2, config.eval_paths // 2)
    z = draw_z(start, n, generator(c.seed, EVALUATION, 0))
    y, strength = conditions(start, c, n)
    u = make_teacher(start, c, strength)
    phi = in_batches(c.eval_batch_size, lambda z, y: solve_ode(u, z, c.solver_steps, "rk4", y), z, y)

    def score(student):
        return relative_error(jump(student, z, y, strength), phi)

    teacher = dict(teacher=str(teacher_file.resolve()), fingerprint=fingerprint(start))
    return run_stage("student", distiller, distiller.draw, c, out, resume, score, **teacher)


SAMPLE_BLOCK = 500  # samples that one process draws in one go, from a noise of their own, into a file


def write_samples(student, config, out, n, classes=None, seed=0, vae=None, resume=False):
    """One-step samples: samples.png, and samples.npz with arr_1 (n,) int64 labels and arr_0, points (n, 2) in
    float32, pictures (n, H, W, C) in uint8, the layout of ADM's evaluation, or latents in float32 if there is
    no autoencoder. Blocks are dealt to all processes and wait in samples.parts until all are there; a block
    is the same whoever draws it. Raises UserError."""
    if resume and (out / "samples.npz").exists():
        return print(f"{out / 'samples.npz'} is finished: --overwrite draws it anew")
    y, strength = conditions(student, config, n)
    if classes:
        known = [str(label) for label in range(student.num_classes)]
        wanted = classes.split(",")
        if not set(wanted) <= set(known):
            all_known = f"0 to {len(known) - 1}" if len(known) > 20 else ",".join(known) or "no labels"
            raise UserError(f"--classes {classes}: this student knows {all_known}", 2)
        y = torch.tensor([int(label) for label in wanted], device=student.pos_embed.device)
        y = y[torch.arange(n) % len(wanted)]
    parts, settings = out / "samples.parts", json.dumps(dict(
        samples=n, classes=classes, seed=seed, guidance=config.strength, labels=config.score_labels,
        vae=vae and vae.config.get("_name_or_path"),
        student=fingerprint(student)))
    kept = parts / "settings.json"
    if resume and kept.exists() and kept.read_text() != settings:
        raise UserError(f"{parts} holds samples of another student or of other settings: give the command "
                        "that began them, or --overwrite", 2)
    wait_for_all()
    if rank() == 0:
        if not resume:
            shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir(parents=True, exist_ok=True)
        save(kept, lambda p: p.write_text(settings))
    wait_for_all()
    rows = torch.arange(n).split(SAMPLE_BLOCK)
    files = [parts / f"{i:06}.npy" for i in range(len(rows))]
    mine = [i for i in range(rank(), len(rows), world_size()) if not files[i].exists()]
    shows = rank() == 0 and len(rows) > 1
    for i in tqdm(mine, "sample", unit="block", disable=None if shows else True):
        z = draw_z(student, SAMPLE_BLOCK, generator(seed, SAMPLING, i))[:len(rows[i])]
        labels = None if y is None else y[rows[i]]
        x = in_batches(config.eval_batch_size, lambda z, y: jump(student, z, y, strength), z, labels)
        if is_plane(x) or x.shape[1] == 4 and vae is None:
            array = x.flatten(1) if is_plane(x) else x.permute(0, 2, 3, 1)
        else:
            x = as_pictures(x, vae)
            array = (127.5 * (x + 1)).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
        save(files[i], lambda p: np.save(p, array.cpu().numpy()))
    wait_for_all()
    if rank():
        return None
    labels = torch.full((n,), student.num_classes) if y is None else y.cpu()
    save(out / "samples.npz", lambda p: write_npz(p, files, labels.numpy()))
    few = files[:8 if student.shape[1:] == (1, 1) else 1]
    x = torch.from_numpy(np.concatenate([np.load(file) for file in few]))
    x = x[:, :, None, None] if x.ndim == 2 else x[:40].permute(0, 3, 1, 2)
    x = x / 127.5 - 1 if x.dtype == torch.uint8 else as_pictures(x)
    save_figure(plot_samples({"student": x}, {"student": f"{n} samples, 1 evaluation"}), out / "samples.png")
    shutil.rmtree(parts)
    print(f"{n} samples are in {out / 'samples.npz'}, a picture of them in {out / 'samples.png'}")


def write_npz(path, files, labels):
    """What numpy.savez writes of arr_0, the rows of the .npy `files`, and arr_1, the labels, with one file in
    memory at a time: 50,000 pictures of 256 x 256 are 10 GB."""
    first = np.load(files[0], mmap_mode="r")
    header = dict(descr=np.lib.format.dtype_to_descr(first.dtype), fortran_order=False,
                  shape=(len(labels), *first.shape[1:]))
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as array:
            np.lib.format.write_array_header_1_0(array, header)
            for file in files:
                array.write(np.ascontiguousarray(np.load(file)).tobytes())
        with archive.open("arr_1.npy", "w") as array:
            np.lib.format.write_array(array, labels)


def make_parser():
    """The flags: those below, and one for every field of Config."""
    commands = "    python", "    torchrun"
    examples = "\n".join(line for line in __doc__.splitlines() if line.startswith(commands))
    parser = argparse.ArgumentParser(
        "fmd.py", usage="python fmd.py [flags]", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Flow map distillation without data. Commands to paste:\n" + examples, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"fmd: {message}; python fmd.py --help lists the flags\n")
    add = parser.add_argument
    add("--stage", default="all", choices=list(STAGE_FILES), help="what to do (default: all)")
    add("--teacher", metavar="FILE", help="distill this teacher (fmd, SiT, REPA) instead of training one; "
        f"touches no data but for meanflow; {' and '.join(RELEASED)} are downloaded")
    add("--student", metavar="FILE", help="sample or evaluate this student")
    add("--out", metavar="DIR", help="folder of the run (default: the next free one of runs/DATASET, ...-2)")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out, or start if none")
    add("--overwrite", action="store_true", help="replace what an earlier run left in --out")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: auto)")
    add("--data", metavar="DIR", default="data", help="folder of MNIST and CIFAR-10 (default: data)")
    add("--encode", metavar="DIR", help="make --latents of a folder of folders of pictures, one a class")
    add("--image-size", type=int, default=256, help="side to which --encode cuts pictures (default: 256)")
    add("--vae", help="autoencoder of latents, through diffusers: a name on its hub, a folder, or none, "
        f"which leaves latents as they are (default: {VAE} for --encode and --stage sample, else none)")
    add("--quick", action="store_true", help="a size that two cores train in minutes")
    add("--samples", type=int, default=4096, help="for --stage sample: how many (default: 4096)")
    add("--classes", help="for --stage sample: labels, such as 0,1,2 (default: as scored)")
    add("--reward", default="first", choices=list(REWARDS), help="for --stage search: what is searched for")
    add("--debug", action="store_true", help="show where an error comes from")
    add = parser.add_argument_group("configuration").add_argument
    for f in dataclasses.fields(Config):
        others = (f"{name}: {str(p[f.name]) or 'none'}" for name, p in PRESETS.items() if f.name in p)
        defaults = [str(f.default) or "none", *others]
        kind = dict(type=f.type, metavar=f.type.__name__.upper())
        if f.type is bool:
            kind = dict(action=argparse.BooleanOptionalAction)
        if f.type is tuple:
            kind = dict(type=float, nargs=2, metavar=("LOW", "HIGH"))
        text = f"{f.metadata['help']} ({', '.join(defaults)})"
        add(flag(f.name), default=argparse.SUPPRESS, help=text, **kind)
    return parser


def pick_device(name):
    """The device of a name; auto is an accelerator if there is one. Raises UserError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if ":" in name and world_size() > 1:
        raise UserError(f"--device {name}: give it without a number, each process has its own", 2)
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {name} is not to be had on this machine: try --device cpu", 2) from e


def pick_folder(args, dataset):
    """--out, or the newest run under runs/ to read or resume, or the next free name there."""
    if args.out or args.student:
        return Path(args.out or Path(args.student).parent)
    names = [Path("runs", dataset if i == 1 else f"{dataset}-{i}") for i in range(1, 10000)]
    free = next(i for i, name in enumerate(names) if not name.exists())
    return names[free - 1 if free and (args.resume or args.stage in READING) else free]


def settle(given, base, grows=()):
    """`base` with the flags that were given. What goes on must be what began: a flag that differs is refused,
    unless it is FREE (changes no training, or is a learning rate), or in `grows` and larger."""
    for name, value in given.items():
        old = getattr(base, name)
        if value != old and name not in FREE and not (name in grows and value > old):
            raise UserError(f"{flag(name)} {value} contradicts {old}, the setting of the run or teacher "
                            "that is used: leave the flag away, or start anew with another --out", 2)
    return dataclasses.replace(base, **given)


def settle_machine(config):
    """Have torch use config.threads at most, and with bfloat16 the fast products of what stays float32."""
    torch.set_num_threads(min(torch.get_num_threads(), config.threads or 1024))
    torch.set_float32_matmul_precision("high" if config.precision == "bfloat16" else "highest")


def find_vae(args, device, wanted=False):
    """The autoencoder of --vae, or None. Raises UserError."""
    name = args.vae or (VAE if wanted else "none")
    return None if name == "none" else load_vae(name, device)


def run(args):
    """One command, from parsed arguments to files."""
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Config) if hasattr(args, f.name)}
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    reads_student = args.stage in READING
    if args.samples < 1:
        raise UserError(f"--samples {args.samples}: give at least 1", 2)
    if args.resume and args.overwrite:
        raise UserError("--resume and --overwrite contradict each other: leave one away", 2)
    if args.student and not reads_student or args.teacher and args.stage in ("teacher", "sample"):
        wrong = "--student" if args.student and not reads_student else "--teacher"
        raise UserError(f"{wrong}: --stage {args.stage} has no use for it, leave it away", 2)
    if args.encode:
        if "latents" not in given or args.image_size % 8 or args.image_size < 8:
            raise UserError("--encode: name the file to be written by --latents FILE.npy; "
                            "--image-size is a multiple of 8", 2)
        if rank():
            return None  # one process encodes
        vae = find_vae(args, pick_device(args.device), wanted=True)
        return encode(args.encode, Path(given["latents"]), vae, given.get("seed", 0), args.image_size,
                      resume=args.resume, overwrite=args.overwrite)
    if args.teacher in RELEASED:
        args.teacher = released(args.teacher)
    run_student(args, given) if reads_student else run_training(args, given)


def check_folder(args, out):
    """Raises UserError if the stage would replace what is there."""
    for name in STAGE_FILES["distill" if args.teacher and args.stage == "all" else args.stage]:
        if (out / name).exists() and not args.resume and not args.overwrite:
            raise UserError(f"{out / name} is there already: --resume goes on with it, --overwrite replaces "
                            "it, another --out leaves it alone", 2)


def find_teacher(args, out, student=None):
    """--teacher, or where the student's checkpoint says it was, or in `out`, if the folder was moved."""
    recorded = Path(student["teacher"]) if student else out
    return Path(args.teacher or (recorded if recorded.is_file() else out / "teacher.pt"))


def run_student(args, given):
    """The stages that read a student: sample, evaluate, search."""
    device, out = pick_device(args.device), pick_folder(args, given.get("dataset", "toy2d"))
    check_folder(args, out)
    student_file = Path(args.student or out / "student.pt")
    checkpoint = read_checkpoint(student_file, "student")
    student = load_network(FlowMap, checkpoint, student_file, device)
    is_latent = student.shape[0] == 4
    out.mkdir(parents=True, exist_ok=True)
    if args.stage == "sample":
        config = settle({k: v for k, v in given.items() if k != "seed"}, checkpoint["config"])
        settle_machine(config)
        vae = find_vae(args, device, wanted=True) if is_latent else None
        return write_samples(student, config, out, args.samples, args.classes, given.get("seed", 0), vae,
                             args.resume)
    config = settle(given, checkpoint["config"])
    teacher, start = open_teacher(find_teacher(args, out, checkpoint), device, config.teacher_format)
    settle_machine(config)
    if rank():
        return None
    if args.stage == "search":
        return search(student, start, config, out, args.reward)
    data, vae = ToyData(config.toy) if config.toy else None, find_vae(args, device) if is_latent else None
    return evaluate(student, start, config, out, {"teacher": teacher, "student": checkpoint}, data, vae)


def run_training(args, given):
    """The stages that train: all, teacher, distill; and benchmark."""
    dataset, form = given.get("dataset", "toy2d"), given.get("teacher_format", "")
    file = args.teacher or (Path(args.out, "teacher.pt") if args.out and args.stage == "distill" else None)
    if file and "dataset" not in given and args.stage != "teacher":  # a teacher knows what it is of
        dataset = read_checkpoint(Path(file), "teacher", form)["config"].dataset
    out = pick_folder(args, dataset)
    resume = {kind: read_checkpoint(out / f"{kind}.pt", kind)
              if args.resume and (out / f"{kind}.pt").exists() else None for kind in ("teacher", "student")}
    for checkpoint in filter(None, resume.values()):  # and so does what goes on
        dataset = given.get("dataset", checkpoint["config"].dataset)
    if args.quick and dataset == "imagenet":
        raise UserError("--quick: ImageNet is not quick; give a smaller --hidden-size and --depth", 2)
    preset = {**PRESETS.get(dataset, {}), **(QUICK.get(dataset, {}) if args.quick else {})}
    config = Config(**{"dataset": dataset, **preset, **given})
    device = pick_device(args.device)
    check_folder(args, out)
    if args.stage == "benchmark":
        settle_machine(config)
        if args.teacher:
            start = open_teacher(Path(args.teacher), device, form)[1]
        else:
            shape, classes = SHAPES[dataset]
            start = new_network(shape, classes, config).to(device).requires_grad_(False)
        return benchmark(start, config)

    # what goes on must be what began
    teacher_file = find_teacher(args, out, resume["student"])
    own_teacher = not args.teacher and args.stage != "distill" and (
        teacher_file.resolve() == (out / "teacher.pt").resolve())
    if resume["student"]:
        began = resume["student"]["config"]
        grows = began.method != "regression"  # its steps decide how many pairs it has
        config = settle(given, began, ["steps"] if grows else [])
        if resume["student"]["step"] == config.steps and (out / "metrics.json").exists():
            return print(f"{out} is finished" + ": a larger --steps goes on with it" * grows)
    elif resume["teacher"] and own_teacher:
        config = settle(given, resume["teacher"]["config"], ["steps", "teacher_steps"])

    vae = None
    if own_teacher:
        data = open_data(config, args.data)  # before anything is replaced
        is_latent = data.shape[0] == 4
    else:
        teacher, start = open_teacher(teacher_file, device, config.teacher_format)
        data, is_latent = None, start.shape[0] == 4
        known = fingerprint(start)
        if resume["student"] and resume["student"].get("fingerprint", known) != known:
            raise UserError(f"{out / 'student.pt'} began with another teacher than {teacher_file}: give that "
                            "one, or start anew with --overwrite", 2)
        names = ["dataset", "toy", *SIZES]  # the teacher decides
        settle({k: v for k, v in given.items() if k in names}, teacher["config"])
        config = dataclasses.replace(config, **{k: getattr(teacher["config"], k) for k in names})
        if teacher["step"] < teacher["config"].teacher_steps:
            print(f"note: the training of {teacher_file} is unfinished")
        if config.method == "meanflow":
            data = open_data(config, args.data)
            if (data.shape, data.num_classes) != (start.shape, start.num_classes):
                raise UserError(f"--method meanflow: data {tuple(data.shape)} with {data.num_classes} labels "
                                f"does not suit a teacher of {start.shape} with {start.num_classes}: give "
                                "its own")
    if is_latent and rank() == 0:
        vae = find_vae(args, device)  # before the training, lest it be missed after it
    if args.stage != "teacher":
        micro_batches(config, world_size())  # refuses what cannot be dealt
    if own_teacher:
        micro_batches(stage_config("teacher", config), world_size(), "--teacher-batch-size")
    settle_machine(config)
    wait_for_all()  # until all have seen what is there
    if rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        for name in ["metrics.json"] + ["metrics.jsonl", "student.pt"] * (own_teacher and not args.resume):
            (out / name).unlink(missing_ok=True)  # of a run that goes on or is replaced
    if own_teacher:
        teacher = train_teacher(data, config, out, device, resume["teacher"])
        start = load_network(DiT, teacher, teacher_file, device)
        teacher = {"seconds": teacher["seconds"]}  # its optimizer is let go
    if args.stage == "teacher":
        return None
    checkpoint = train_student(start, config, out, teacher_file, resume["student"], data)
    if rank():
        return None
    student = load_network(FlowMap, checkpoint, out / "student.pt", device)
    return evaluate(student, start, config, out, {"teacher": teacher, "student": checkpoint}, data, vae)


@contextlib.contextmanager
def processes():
    """What torchrun started finds together, and all but process 0 fall silent."""
    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # long enough for process 0 to measure, save or download while the others wait
    distributed.init_process_group(timeout=datetime.timedelta(minutes=60))
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere if rank() else sys.stdout):
        yield
    distributed.destroy_process_group()


def main(argv=None):
    """The command line. Returns the exit status: 0 done, 1 failed in running, 2 a wrong command."""
    args = make_parser().parse_args(argv)
    terminate = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a kill ends as Ctrl-C does
    try:
        with processes():
            run(args)
        return 0
    except (Exception, KeyboardInterrupt) as e:
        if args.debug:
            raise
        status = e.args[1] if isinstance(e, UserError) and len(e.args) > 1 else 1
        line = e.args[0] if isinstance(e, UserError) else f"{type(e).__name__}: {e} (--debug shows where)"
        if isinstance(e, KeyboardInterrupt):
            line = "interrupted; the same command with --resume goes on"
        elif isinstance(e, OSError):
            line = f"{e.strerror or e} {e.filename or ''}: mend or free the place, or choose another --out"
        elif "out of memory" in str(e).lower() or "allocate memory" in str(e).lower():
            line = "out of memory: lower --micro-batch-size or --batch-size; --activation-checkpointing helps"
        elif world_size() > 1 and any(word in str(e).lower() for word in ("gloo", "nccl", "connection")):
            line = f"a process was lost; --resume goes on from the last checkpoint ({str(e)[:200]})"
        if rank() and isinstance(e, (UserError, KeyboardInterrupt)):
            return status  # process 0 says the same
        print("fmd:", f"process {rank()}: " * (rank() > 0) + " ".join(line.split()), file=sys.stderr)
        return status
    finally:
        signal.signal(signal.SIGTERM, terminate)


if __name__ == "__main__":
    matplotlib.use("Agg")
    sys.exit(main())
