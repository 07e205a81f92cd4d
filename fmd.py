"""fmd: flow map distillation without data, in one file.

A flow model draws a sample by solving an ODE with hundreds of network evaluations. This file
distills such a teacher, without data, into a student that needs one. Section 1 is the paper (Tong,
Ma, Xie and Jaakkola, "Flow Map Distillation Without Data", FreeFlow, arXiv 2511.19428). Then read
FlowMatching (2), prediction, correction and RECIPES (5), train and TrainState.update (6). You may
skip the rest: 3. Network (the usual DiT)  4. Data  7. Measures  8. Pictures  9. Files  10. Runs

Notation, everywhere in this file
    t              0 is data x, 1 is noise n ~ N(0, I); x_t = (1 - t) x + t n
    u(x_t, t)      the teacher's velocity, from noise to data, trained to be E[x - n | x_t]
    delta = 1 - t  the progress of a path: sampling solves dx/ddelta = u(x, 1 - delta)
    phi(z, delta)  the state that the teacher's path from the noise z reaches at delta
    F(z, delta)    the student's network: learns the average velocity of this path up to delta
    f(z, delta)    the student's phi: one jump along F, f = z + delta F. f(z, 1) is a sample
    v_G, D_G       predict (G: generating). v_G = df/ddelta at fixed z, D_G = v_G - u(f, 1 - delta)
    v_N, D_N       correct (N: noising). The student's samples x are noised to x_r at a random time
                   r, by new noise n. v_N = E[x - n | x_r] (by a critic), D_N = v_N - u(x_r, r)
    y, guidance    the label (num_classes or None: null, any class); the strength gamma of guidance
    sg             stop-gradient: held constant
Shapes: x, z, n are images (B, C, H, W) of d = C H W values; a point of the plane is 2 x 1 x 1.
    t, delta, r, guidance are (B,), or (1,) if one value serves all. y is int64, (B,) or (1,).
The paper's equations, with theta the student's weights
    [7] v_G = u(f, 1 - delta)                     [8] the loss 1/2 E||F - sg(F - D_G)||^2
    [9] its gradient, E[(dF/dtheta)^T D_G]        [10] KL(student's x_r || teacher's x_r) for each r
    [11] its gradient, E[(dF/dtheta)^T D_N], up to a weight for each r, if u and v_N are exact

Commands to paste (ImageNet: README); the same command continues a run that was interrupted
    python fmd.py --dataset toy2d          # by our recipe (section 5); --recipe paper: the paper's
    python fmd.py --dataset mnist --quick  # digits with guidance, on two cores
"""

import argparse
import contextlib
import copy
import dataclasses
import json
import math
import os
import re
import signal
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nnf  # not F: that is the student's average velocity
from filelock import FileLock
from matplotlib.animation import FuncAnimation
from matplotlib.figure import Figure
from torch import distributed, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets, utils
from tqdm import tqdm

# 1. The method -----------------------------------------------------------------------------------
# A teacher is any function u(x, t, y=None) that returns a velocity.
# Why from noise alone: a guided or imperfect teacher passes through states that noised data rarely
# reach (the teacher-data mismatch). A student that trains on noised data, as MeanFlow (arXiv
# 2505.13447) does, rarely sees them. At t = 1 the states of any teacher are known: noise, N(0, I).
# From there on the student makes its states itself: u is evaluated at its own f.

METHODS = {"euler": 1, "heun": 2, "rk4": 4}  # evaluations of u in a step of solve_ode
EPS = 1e-3  # of decay and lambda; the paper's value is not known to us


def expand(v):
    """(B,) -> (B, 1, 1, 1), to multiply images (B, C, H, W)."""
    return v[:, None, None, None]


def interpolate(x, n, t):
    """The interpolant I_t(x, n) = (1 - t) x + t n. x, n: (B, C, H, W); t: (B,) or (1,)."""
    return expand(1 - t) * x + expand(t) * n


class FlowMap:
    """The student: a network, read as F. It starts with the teacher's weights: then F(z, 0) =
    u(z, 1), the first slope of an unguided path."""

    def __init__(self, network):
        self.network = network

    def F(self, z, delta, y=None, guidance=None):
        """F(z, delta), (B, C, H, W), for delta in [0, 1]. The network's input is always the noise
        z: the state at delta is what f has to learn. The time input is where the jump ends."""
        return self.network(z, 1 - delta, y, guidance)

    def f(self, z, delta, y=None, guidance=None):
        """f(z, delta), (B, C, H, W). f(z, 0) = z for any weights: paths start right by design."""
        return z + expand(delta) * self.F(z, delta, y, guidance)


@torch.no_grad()
def solve_ode(u, z, steps, method="heun", y=None, return_path=False, t=1.0, length=1.0):
    """Solve dx/ddelta = u(x, 1 - delta) from x = z in equal steps, from time t down to t - length
    (numbers or (B,)), by default to phi(z, 1). Returns the last state (B, C, H, W), or with
    return_path all steps + 1, stacked. Raises ValueError for no steps, or an unknown method."""
    if steps < 1 or method not in METHODS:
        raise ValueError(f"solve_ode: {steps} steps of {method}; give 1 or more of {[*METHODS]}")
    t = torch.as_tensor(t, dtype=z.dtype, device=z.device).view(-1)
    dt = torch.as_tensor(length, dtype=z.dtype, device=z.device).view(-1) / steps
    step = expand(dt)
    path = [z]
    for _ in range(steps):
        x = path[-1]
        slope = k1 = u(x, t, y)
        if method == "heun":
            slope = (k1 + u(x + step * k1, t - dt, y)) / 2
        elif method == "rk4":
            k2 = u(x + step / 2 * k1, t - dt / 2, y)
            k3 = u(x + step / 2 * k2, t - dt / 2, y)
            k4 = u(x + step * k3, t - dt, y)
            slope = (k1 + 2 * k2 + 2 * k3 + k4) / 6
        path.append(x + step * slope)
        t = t - dt
    return torch.stack(path) if return_path else path[-1]


def guided(teacher, guidance, interval=(0.0, 1.0)):
    """Classifier-free guidance: u_gamma = gamma u(.|y) + (1 - gamma) u(.|null). guidance: gamma,
    (B,) or (1,), or None for the teacher itself; outside of the interval of t it is 1."""
    if guidance is None:
        return teacher

    def u(x, t, y=None):
        null = teacher(x, t)
        # 1e-4, since at the ends a solver's t has rounding errors
        is_inside = (interval[0] - 1e-4 <= t) & (t <= interval[1] + 1e-4)
        return null + expand(torch.where(is_inside, guidance, 1.0)) * (teacher(x, t, y) - null)

    return u


def mean_square(D):
    """||D||^2 / d of every sample: (B, C, H, W) -> (B,)."""
    return D.flatten(1).square().mean(1)


@torch.no_grad()  # sg: D_G is a constant. (jvp does not need a graph.)
def prediction_gradient(student, u, z, delta, y=None, guidance=None, form="jvp", spacing=0.005):
    """Predict: D_G = v_G - u(f, 1 - delta), (B, C, H, W), with v_G = F + delta dF/ddelta. If it is
    0 for all z and delta [7], f solves the teacher's ODE from f(z, 0) = z: only phi does.
    form: how dF/ddelta is computed, "jvp" (forward mode, exact) or "difference" (of F at delta +
    spacing and delta - spacing, one-sided at the ends). Raises ValueError for another form.

    Why a small D_G can leave a large error e = f - phi: de/ddelta = D_G + du, with du the change of
    u from phi to f. Between modes, where paths part, du makes e grow. Inside a mode it mostly makes
    e shrink. With L = <e, du> / ||e||^2, d||e||/ddelta <= ||D_G|| + L ||e||, so that at delta = 1
    ||e|| is at most (Gronwall; notebook, section 5)
        the integral over delta of ||D_G|| exp(integral of L from delta to 1)."""
    # Why a partial derivative: z is fixed, and only the end of the jump moves with delta. (In
    # MeanFlow the start moves, so its derivative also has a term (dF/dx_t) dx_t/dt.)
    if form == "jvp":
        # Fused attention has no forward-mode derivative. jvp refuses an expanded tensor.
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            F, dF = torch.func.jvp(lambda v: student.F(z, v, y, guidance),
                                   (delta.contiguous(),), (torch.ones_like(delta),))
    elif form == "difference":
        low = (delta - spacing).clamp(min=0)
        high = (delta + spacing).clamp(max=1)
        F = student.F(z, delta, y, guidance)
        dF = (student.F(z, high, y, guidance) - student.F(z, low, y, guidance)) / expand(high - low)
    else:
        raise ValueError(f"prediction_gradient: {form} is not jvp or difference")
    # Why u at f: a solution of the ODE has df/ddelta = u(f, 1 - delta) [7], and the student's own f
    # costs neither data nor a solver. While f is wrong, u is evaluated at a wrong place, and errors
    # may compound: hence the correction.
    # Why sg: the target of [8], F - D_G = u(f, 1 - delta) - delta dF/ddelta, depends on the weights
    # too. A gradient through it could move f to where u happens to be near v_G, and would need
    # second derivatives.
    # Why it still converges, though with sg no loss is minimized: with s the time of training, [9]
    # is df/ds = delta (u(f, 1 - delta) - df/ddelta), if F can change freely at each z and delta,
    # and k = 0. This carries f(z, 0) = z, right by design, along the teacher's ODE to longer and
    # longer jumps (README; notebook, section 3).
    f = z + expand(delta) * F
    return F + expand(delta) * dF - u(f, 1 - delta, y)  # [7] as a residual: D_G of [9]


@torch.no_grad()  # sg
def correction_gradient(v_N, u, x_r, r, y=None):
    """Correct: D_N = v_N - u(x_r, r) of [11], (B, C, H, W). D_G checks one point of a path. D_N
    compares the student's samples, as a set, with the teacher's.

    Why descent of F(z, 1) . D_N lowers a weighted mean of the KLs [10], if u and v_N are exact: the
    gradient of the KL at r is E[(dx_r/dtheta)^T (s - s_u)], s and s_u the scores (gradients of log
    p) of student and teacher. By Tweedie's formula s = -E[n | x_r] / r, E[n | x_r] = x_r - (1 - r)
    v_N, and s_u is the same with u: s - s_u = D_N (1 - r) / r. And dx_r/dtheta = (1 - r) dF/dtheta.
    [11] leaves out (1 - r)^2 / r, which only weights the mean over r (notebook, section 6).

    Why D_N need not be zero for a perfect student: s_u is the teacher's score only if u is
    E[x - n | x_r] over the samples x of u's own ODE. A learned u is only near this mean, a guided u
    is in general another function.
    Why the correction has its own guidance interval: a guided u pulls even a perfect student to
    stronger guidance (on digits: README), an unguided u to weaker. The paper guides u for r up to
    0.7 only, a compromise: FID 5.6 (DiT-B/2), for all r 8.7."""
    return v_N - u(x_r, r, y)  # D_N of [11]


def decay(D, k):
    """D / (||D||^2 / d + eps)^k of each sample.
    What k does: a residual of size m, m^2 = ||D||^2 / d well above eps, gets the size m^(1 - 2k).
    At k = 0 large ones dominate the gradient, at 1/2 all count equally, at 1 large ones count less.
    Why: the paper's FID (DiT-B/2) is 43.5, 10.6, 5.6 for k = 0, 1/2, 1; without correction about 12
    for each. Our explanation, from toys: relative to the decayed D_G the correction has the size
    alpha (m^2 + eps)^k (see balance). For small m this is largest at k = 0, and so is the effect of
    its critic's errors (notebook, section 7)."""
    return D / expand((mean_square(D) + EPS) ** k)


class Distiller(nn.Module):
    """The paper's loss. draw draws the batch of a step, forward is its loss. (Section 6 trains it.)
    teacher: u(x, t, y), its weights stay the same. network: usually a copy of it, read as F.
    critic: another copy, which learns v_N. A copy is near the final goal: v_N will be roughly u,
    once the student has learned (less so with guidance). config: prediction is not solver."""

    def __init__(self, network, critic, teacher, config):
        super().__init__()
        self.network, self.critic, self.teacher, self.config = network, critic, teacher, config

    def forward(self, z_G, y_G, delta, z_N, y_N, r, n, guidance_G=None, guidance_N=None, h=None):
        """Rows _G predict, rows _N correct. h: for SolverDistiller. Returns loss, metrics."""
        config, student = self.config, FlowMap(self.network)
        loss, metrics, D_G = 0.0, {}, None
        if len(z_G):  # Predict
            u = guided(self.teacher, guidance_G, config.guidance_interval)
            F = student.F(z_G, delta, y_G, guidance_G)  # with a graph, for the loss
            D_G = self.residual(student, u, F, z_G, delta, y_G, guidance_G, h)  # of [9]
            metrics["prediction"] = mean_square(D_G).mean()
            # Why F * sg(D): its gradient is [9], up to 1/d and (k > 0) a weight for each sample,
            # which does not move the zero of D_G. The value of this loss means nothing.
            loss = (F * decay(D_G, config.decay)).mean()
        if len(z_N):  # Correct, at delta = 1: the paper found no gain at other delta
            u = guided(self.teacher, guidance_N, config.correction_interval)
            F = student.F(z_N, torch.ones_like(r), y_N, guidance_N)
            x = (z_N + F).detach()  # f(z, 1), one-step samples
            x_r = interpolate(x, n, r)
            # Why a critic: v_N, of the student's own samples, has no closed form and changes at
            # every step. Flow matching learns it. As x is detached, this trains only the critic.
            v_N = self.critic(x_r, r, y_N, guidance_N)
            critic_loss = (v_N - (x - n)).square().mean()
            D_N = correction_gradient(v_N, u, x_r, r, y_N)
            lambda_ = self.balance(D_G, D_N)
            # D_N is not decayed: factors of r only reweight the KLs, but decay depends on x_r, and
            # so the result would not be the gradient of a KL.
            loss = loss + lambda_ * (F * D_N).mean() + critic_loss  # the gradient of F * D_N: [11]
            metrics |= {"correction": mean_square(D_N).mean(), "critic": critic_loss,
                        "lambda": lambda_}
        return loss, metrics

    def residual(self, student, u, F, z, delta, y, guidance, h):
        """D_G, (B, C, H, W), without a graph. F: F(z, delta). F and h: for SolverDistiller."""
        return prediction_gradient(student, u, z, delta, y, guidance, self.config.prediction)

    def balance(self, D_G, D_N):
        """lambda = alpha E|D_G| / (E|D_N| + eps), |D| = ||D|| / sqrt(d); alpha if D_G is None.

        Why lambda: the sizes of D_G and D_N change in training. Why D_G before its decay (our
        choice): if all |D_G| are m, the correction has the size alpha m (once E|D_N| is well above
        eps), the decayed prediction m / (m^2 + eps)^k, and their ratio is alpha (m^2 + eps)^k. So
        for k > 0 the correction fades as m falls. It should, as D_N need not be zero in the end.
        (With the decayed D_G the ratio would always be alpha.)"""
        if D_G is None:
            return torch.tensor(self.config.alpha, device=D_N.device)
        norm_G = mean_over_processes(mean_square(D_G).sqrt().mean())
        norm_N = mean_over_processes(mean_square(D_N).sqrt().mean())
        return self.config.alpha * norm_G / (norm_N + EPS)

    def draw(self, step):
        """The batch of a step, from the prior alone: {name: tensor, one row for each sample}."""
        config, classes, shape = self.config, self.network.num_classes, self.network.shape
        g = generator(config.seed, STUDENT, step)  # this and mean_over_processes: section 6
        rows_N = config.corrections
        rows_G = config.batch_size - rows_N
        batch = {}
        for side, count in ("G", rows_G), ("N", rows_N):
            y = torch.randint(max(1, classes), (count,), generator=g)  # no classes: 0 is null
            is_null = torch.rand(count, generator=g) < config.label_dropout
            batch[f"z_{side}"] = torch.randn(count, *shape, generator=g)
            batch[f"y_{side}"] = torch.where(is_null, classes, y)
            if config.is_guided:
                uniform = torch.rand(count, generator=g)
                batch[f"guidance_{side}"] = 1 + (config.guidance_max - 1) * uniform
        # Why all delta: D_G = 0 at delta = 1 alone relates f to its slope there. At all delta it
        # makes f the path. Each of rows_G equal parts of (0, 1] has a row, so no batch misses one.
        batch["delta"] = 1 - (torch.arange(rows_G) + torch.rand(rows_G, generator=g)) / rows_G
        # Why r includes much noise (median 0.69): with little of it the x_r of student and teacher
        # hardly overlap, and D_N hardly sees modes that the student lacks. (The paper's FID: 92 if
        # no r is above 0.6, 6.0 for uniform r, 5.6 for r_location 0.8.)
        batch["r"] = torch.sigmoid(config.r_location + torch.randn(rows_N, generator=g))
        batch["n"] = torch.randn(rows_N, *shape, generator=g)
        return batch


# 2. Teachers -------------------------------------------------------------------------------------
class GaussianMixture(nn.Module):
    """Equally likely Gaussians N(means[k], blur^2 I): data, its exact velocity, and its support.
    means: (K, d); blur > 0; labels: (K,) int64 below num_classes, all 0 without classes. center,
    scale: numbers or lists of d. The user's point is center + scale x."""

    def __init__(self, means, blur, labels, num_classes, center=0.0, scale=1.0):
        super().__init__()
        self.register_buffer("means", means)
        self.register_buffer("labels", labels)
        self.blur, self.num_classes = blur, num_classes
        self.has_velocity = len(means) <= 2000  # more need too much memory, also in coverage
        self.shape = (means.shape[1], 1, 1)
        self.coordinates = {"center": center, "scale": scale}

    def forward(self, x, t, y=None):
        """The exact u(x, t | y), (B, d, 1, 1). x_t is a mixture too, with means (1 - t) mu_k and
        variance (1 - t)^2 blur^2 + t^2. In component k, x - n and x_t are jointly Gaussian, so
        E[x - n | x_t, k] = mu_k + slope (x_t - (1 - t) mu_k), with slope = Cov(x - n, x_t) /
        Var(x_t). Averaged over k with weights p(k | x_t), mu_k becomes E[mu_k | x_t]."""
        x_t = x.flatten(1)
        t = t[:, None]
        variance = (1 - t) ** 2 * self.blur**2 + t**2
        slope = ((1 - t) * self.blur**2 - t) / variance
        inner = (1 - t) * (x_t @ self.means.T) - (1 - t) ** 2 * self.means.square().sum(1) / 2
        log_weight = inner / variance  # (B, K): log p(k | x_t) up to a term common to all k
        if y is not None:
            allowed = (y[:, None] == self.labels) | (y[:, None] == self.num_classes)
            log_weight = log_weight.masked_fill(~allowed, -math.inf)
        mean = log_weight.softmax(1) @ self.means  # E[mu_k | x_t]
        return (mean + slope * (x_t - (1 - t) * mean)).view_as(x)

    def draw(self, N, g):
        """N points (N, d, 1, 1) and their labels (N,)."""
        k = torch.randint(len(self.means), (N,), generator=g)
        x = self.means[k] + self.blur * torch.randn(N, self.means.shape[1], generator=g)
        return x[:, :, None, None], self.labels[k]

    def coverage(self, x):
        """For points (N, d, 1, 1): the share outside, farther than 3.5 blurs from all means; and
        points inside / points expected, of the label where this is smallest."""
        distance, nearest = torch.cdist(x.flatten(1), self.means).min(1)
        is_inside = distance <= 3.5 * self.blur
        expected = self.labels.bincount() * len(x) / len(self.labels)  # of each label
        found = self.labels[nearest[is_inside]].bincount(minlength=len(expected))
        outside = 1 - is_inside.float().mean()
        return {"outside": outside.item(), "rarest label": (found / expected).min().item()}


class FlowMatching(nn.Module):
    """The teacher's loss: regress u(x_t, t) on x - n, whose conditional mean is the velocity."""

    def __init__(self, network, data, config):
        super().__init__()
        self.network, self.data, self.config = network, data, config

    def forward(self, x, n, t, y):
        loss = (self.network(interpolate(x, n, t), t, y) - (x - n)).square().mean()
        return loss, {"flow_matching": loss}

    def draw(self, step):
        g = generator(self.config.seed, TEACHER, step)
        x, y = self.data.draw(self.config.batch_size, g)
        is_null = torch.rand(len(y), generator=g) < self.config.label_dropout
        t = torch.sigmoid(self.config.t_location + torch.randn(len(y), generator=g))
        n = torch.randn(x.shape, generator=g)
        return {"x": x, "n": n, "t": t, "y": torch.where(is_null, self.data.num_classes, y)}


# 3. Network --------------------------------------------------------------------------------------
def embed(v, mlp):
    """Numbers (B,) -> (B, E): cosines and sines, then an MLP. As in SiT, t is not times 1000."""
    frequencies = torch.exp(-math.log(10000) / 128 * torch.arange(128, device=v.device))
    angle = v[:, None] * frequencies  # (B, 128)
    # In float32, like the last layer: in bfloat16 the error of D_G is 1.5 times as large.
    with torch.autocast(v.device.type, enabled=False):
        return mlp(torch.cat([angle.cos(), angle.sin()], 1))


def modulate(x, shift, scale):
    """LayerNorm of tokens x (B, T, E), with shift and scale (B or 1, 1, E) by the condition."""
    return nnf.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Block(nn.Module):
    """Attention and MLP on tokens x (B, T, E), with shift, scale and gate by a condition (B, E)."""

    def __init__(self, E, num_heads, qk_norm):
        super().__init__()
        self.head_dim = E // num_heads
        norm = nn.LayerNorm if qk_norm else nn.Identity
        self.attn = nn.ModuleDict({"qkv": nn.Linear(E, 3 * E), "proj": nn.Linear(E, E),
                                   "q_norm": norm(self.head_dim), "k_norm": norm(self.head_dim)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(E, 4 * E), "fc2": nn.Linear(4 * E, E)})
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(E, 6 * E))

    def attention(self, x):
        B, T, E = x.shape
        if T == 1:  # for speed: attention of one token returns its value
            value = nnf.linear(x, self.attn.qkv.weight[2 * E :], self.attn.qkv.bias[2 * E :])
            return self.attn.proj(value)
        qkv = self.attn.qkv(x).view(B, T, 3, -1, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, T, E / heads)
        x = nnf.scaled_dot_product_attention(self.attn.q_norm(q), self.attn.k_norm(k), v)
        return self.attn.proj(x.transpose(1, 2).reshape(B, T, E))

    def forward(self, x, condition):
        modulation = self.adaLN_modulation(condition)[:, None]  # (B, 1, 6 E)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, 2)
        x = x + gate_a * self.attention(modulate(x, shift_a, scale_a))
        hidden = nnf.gelu(self.mlp.fc1(modulate(x, shift_m, scale_m)), approximate="tanh")
        return x + gate_m * self.mlp.fc2(hidden)


class DiT(nn.Module):
    """The network of arXiv 2212.09748, with the tensor names of public code: u(x, t | y), and with
    is_guided=True u(x, t | y, gamma). A point of the plane is one token. center, scale: of
    GaussianMixture, kept for run_sampling. settings: the arguments, for checkpoints."""

    def __init__(self, input_size=1, in_channels=2, num_classes=8, hidden_size=64, depth=3,
                 num_heads=1, patch_size=1, qk_norm=False, is_guided=False, center=0.0, scale=1.0):
        super().__init__()
        self.settings = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        E, p, C = hidden_size, patch_size, in_channels
        self.shape, self.num_classes = (C, input_size, input_size), num_classes
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(C, E, p, stride=p)})
        # A point also enters by sines and cosines, for the sharp edges of toys.
        self.fourier_embedder = nn.Linear(6 * C, E) if input_size == 1 else None
        # Where a token lies: sines and cosines of its column in one half, of its row in the other.
        frequencies = 10000 ** (-4 * torch.arange(E // 4, dtype=torch.float64) / E)
        angle = torch.arange(input_size // p, dtype=torch.float64)[:, None] * frequencies
        waves = torch.cat([angle.sin(), angle.cos()], 1).float()  # (tokens in a row, E / 2)
        columns, rows = waves.repeat(len(waves), 1), waves.repeat_interleave(len(waves), 0)
        self.register_buffer("pos_embed", torch.cat([columns, rows], 1)[None])  # (1, T, E)
        mlp = nn.Sequential(nn.Linear(256, E), nn.SiLU(), nn.Linear(E, E))
        self.t_embedder = nn.ModuleDict({"mlp": mlp})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(num_classes + 1, E)})
        self.blocks = nn.ModuleList(Block(E, num_heads, qk_norm) for _ in range(depth))
        self.final_layer = nn.ModuleDict({
            "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(E, 2 * E)),
            "linear": nn.Linear(E, p * p * C)})
        # Last, see from_teacher.
        self.guidance_embedder = copy.deepcopy(self.t_embedder) if is_guided else None
        self.activation_checkpointing = False
        # As in DiT, blocks start as the identity and the output as zero. Embedders start larger.
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or "adaLN_modulation" in name or "final_layer" in name:
                nn.init.zeros_(parameter)
            elif "x_embedder" in name or "fourier" in name:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
            elif parameter.ndim == 2:
                nn.init.xavier_uniform_(parameter)

    @staticmethod
    def from_teacher(teacher, is_guided=False):
        """A copy of the teacher. A new input for guidance has no effect, its last layer is 0. (It
        comes last, as in __init__: saved optimizers rely on the order of parameters.)"""
        network = copy.deepcopy(teacher).requires_grad_()
        if is_guided and network.guidance_embedder is None:
            network.settings["is_guided"] = True
            network.guidance_embedder = copy.deepcopy(network.t_embedder)  # not drawn anew
            for parameter in network.guidance_embedder.mlp[2].parameters():
                nn.init.zeros_(parameter)
        return network

    def forward(self, x, t, y=None, guidance=None):
        """x (B, C, H, W); t (B,) or (1,) in [0, 1]; y: None is the null label; guidance: None is
        strength 1. Returns (B, C, H, W). Raises ValueError for guidance without an input."""
        if y is None:
            y = torch.full((1,), self.num_classes, device=x.device)
        condition = embed(t, self.t_embedder.mlp) + self.y_embedder.embedding_table(y)
        if self.guidance_embedder is not None:
            strength = t.new_ones(1) if guidance is None else guidance
            condition = condition + embed(strength, self.guidance_embedder.mlp)
        elif guidance is not None:
            raise ValueError("this network has no input for guidance: give guidance_max above 1")
        B, C, H, W = x.shape
        p = self.settings["patch_size"]
        patches = nnf.pixel_unshuffle(x, p).flatten(2).mT  # (B, T, C p p), tokens row by row
        proj = self.x_embedder.proj  # a convolution, applied as a matrix, which is faster
        x = nnf.linear(patches, proj.weight.flatten(1), proj.bias) + self.pos_embed  # (B, T, E)
        if self.fourier_embedder is not None:
            angle = torch.cat([patches, 2 * patches, 4 * patches], 2)
            x = x + self.fourier_embedder(torch.cat([angle.sin(), angle.cos()], 2))
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = recompute(block, x, condition, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, condition)
        with torch.autocast(x.device.type, enabled=False):
            shift, scale = self.final_layer.adaLN_modulation(condition)[:, None].chunk(2, 2)
            x = self.final_layer.linear(modulate(x, shift, scale))  # (B, T, p p C)
        x = x.view(B, H // p, W // p, p, p, C)  # row and column of the token, then of the pixel
        return x.permute(0, 5, 1, 3, 2, 4).reshape(B, C, H, W)


# 4. Data -----------------------------------------------------------------------------------------
# Data has shape, num_classes, coordinates, has_velocity, draw(N, generator) -> images, labels (N,).
TOYS = ("checkerboard", "gaussians", "moons", "spirals", "rings")


def make_toy(name):
    """One of TOYS as a GaussianMixture with a spread near 1. Raises KeyError for another name."""
    # means: points x + iy, of shape (labels, means of each label)
    circle = torch.polar(torch.ones(192), math.tau * torch.arange(192) / 192)
    cells = [x + 1j * y for x in range(-2, 2) for y in range(-2, 2) if (x - y) % 2 == 0]
    grid = [x / 6 + 1j * y / 6 for x in range(6) for y in range(6)]  # fills a cell
    board = torch.tensor(cells)[:, None] + (torch.tensor(grid) + (1 + 1j) / 12)
    moon = 1.4 * circle[:96] - (0.7 + 0.35j)  # half a circle; -moon is the other moon
    part = ((torch.arange(96) + 0.5) / 96).sqrt()  # of the radius: nearly even steps along an arm
    arm = torch.polar(2 * part, 6 * part)  # radius, angle
    means, blur = {
        "checkerboard": (board, 0.08),
        "gaussians": (1.4 * circle[::24, None], 0.15),
        "moons": (torch.stack([moon, -moon]), 0.08),
        "spirals": (torch.stack([arm, -arm]), 0.06),
        "rings": (1.15 * circle[::64, None] + 0.7 * circle[::2], 0.06)}[name]
    labels = torch.arange(len(means)).repeat_interleave(means.shape[1])
    return GaussianMixture(torch.view_as_real(means.flatten()), blur, labels, len(means))


class ImageData:
    """Labelled images (N, C, H, W): uint8 pictures, drawn in [-1, 1], or latents as they are."""

    def __init__(self, images, labels, num_classes):
        self.images = images
        self.labels = torch.as_tensor(labels, dtype=torch.int64)
        self.num_classes = num_classes
        self.shape = images.shape[1:]
        self.coordinates = {"center": 0.0, "scale": 1.0}  # as in GaussianMixture
        self.has_velocity = False

    def draw(self, N, g):
        i = torch.randint(len(self.labels), (N,), generator=g)
        x = torch.from_numpy(self.images[i.numpy()].astype(np.float32))
        bad = i[~(x.flatten(1).std(1) > 0)]  # also where the deviation is NaN
        if len(bad):
            raise UserError(f"row {bad[0]} of the data is constant or not finite: replace it")
        if self.images.dtype == np.uint8:
            x = x / 127.5 - 1
        return x, self.labels[i]


# 5. Settings -------------------------------------------------------------------------------------
class UserError(Exception):
    """What the user can correct. The command line exits with 1, or for WrongCommand with 2."""


class WrongCommand(UserError):
    """The same, found before any work."""


def option(default, help, low=-(10**10), high=10**10, choices=None):
    """A field of Config: its default, its help, its lowest and highest value, or its choices."""
    return dataclasses.field(default=default, metadata=locals())


def flag(name):
    """The flag of a field of Config."""
    return "--" + name.replace("_", "-")


@dataclasses.dataclass
class Config:
    """Every setting of a run. Default: recipe "paper", the network of toys. Raises WrongCommand."""

    # the run
    dataset: str = option("toy2d", "data", choices=["toy2d", "mnist", "cifar10", "imagenet"])
    recipe: str = option("", "algorithm: the paper's or ours", choices=["", "paper", "fast"])
    quick: bool = option(False, "a size for two cores and minutes; ignored for imagenet")
    stage: str = option("all", "what to do", choices=["all", "teacher", "sample"])
    out: str = option("", "folder of the run; default: under runs/, named after the flags")
    seed: int = option(0, "decides all random numbers", 0, 2**62)
    debug: bool = option(False, "show where an error comes from")
    # data and teacher
    toy: str = option("checkerboard", f"{', '.join(TOYS)}, or POINTS.npy with N x 2 numbers")
    data: str = option("data", "folder of MNIST and CIFAR-10, or ImageNet latents FILE.npy")
    teacher: str = option("", "distill this file of fmd, SiT or REPA; train no teacher")
    teacher_format: str = option("", "of a file of SiT or REPA", choices=["", "sit", "repa"])
    trust_teacher: bool = option(False, "distill a teacher whose samples do not look like data")
    exact_teacher: bool = option(False, "distill a toy's exact velocity, not the teacher's")
    student: str = option("", "start from this student.pt, instead of a copy of the teacher")
    # network: teacher, student and critic
    hidden_size: int = option(48, "width", 8)
    depth: int = option(3, "number of blocks", 1)
    num_heads: int = option(1, "attention heads", 1)
    patch_size: int = option(1, "side of a token in pixels", 1)
    # training of both
    batch_size: int = option(256, "samples per step", 1)
    ema_decay: float = option(0.995, "of the averaged weights, the result; less at first", 0, 1)
    label_dropout: float = option(0.1, "share of labels made null; guided toys: 0.1", 0, 1)
    teacher_steps: int = option(20000, "training steps of the teacher", 1)
    teacher_learning_rate: float = option(3e-4, "peak", 0)
    t_location: float = option(0.0, "t = sigmoid(t_location + N(0, 1)); lower: nearer to data")
    steps: int = option(20000, "training steps of the student", 1)
    learning_rate: float = option(1e-4, "peak", 0)
    critic_learning_rate: float = option(1e-4, "peak", 0)
    # prediction [7, 8, 9]
    prediction: str = option("jvp", "how to find D_G", choices=["jvp", "difference", "solver"])
    delta_scale: float = option(1.0, "form solver: delta = min(1, this x uniform)", 1)
    solver_interval: float = option(0.6, "form solver: h = min(delta, 0.5 to 1 x this)", 1e-4, 1)
    solver_steps: int = option(2, "form solver: RK4 steps of the teacher in an interval", 1)
    ema_target: bool = option(False, "form solver: jump with the student's averaged weights")
    decay: float = option(1.0, "k: D_G is divided by (||D_G||^2 / d + eps)^k", 0, 1)
    # correction [10, 11]. The share is not a weight: each loss is a mean over its own rows.
    correction_share: float = option(0.25, "of the batch; 0: predict only, 1: correct only", 0, 1)
    alpha: float = option(1.0, "lambda = alpha E|D_G| / (E|D_N| + eps), |D| = ||D|| / sqrt(d)", 0)
    r_location: float = option(0.8, "r = sigmoid(r_location + N(0, 1)); higher: more noise")
    # guidance of the teacher
    guidance_max: float = option(1.0, "train for strengths from 1 to this; 1: no guidance", 1)
    guidance_interval: tuple = option((0.0, 1.0), "guidance is active for these t", 0, 1)
    correction_interval: tuple = option((0.0, 1.0), "the same, in the correction", 0, 1)
    guidance: float = option(1.0, "strength of samples and measures, 1 to guidance_max", 1)
    # machine
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "cpu or cuda")
    precision: str = option("float32", "number format in training", choices=["float32", "bfloat16"])
    micro_batches: int = option(1, "parts of a step, to save memory; each has its own lambda", 1)
    activation_checkpointing: bool = option(False, "recompute activations to save memory")
    compile: bool = option(False, "torch.compile the networks")
    # results
    eval_samples: int = option(4000, "samples of each set in SW2", 4)
    samples: int = option(4096, "with --stage sample: how many", 1)
    classes: str = option("", "with --stage sample: labels, such as 0,1,2")
    sample_seed: int = option(0, "with --stage sample: of the noises", 0, 2**62)

    def __post_init__(self):
        for f in dataclasses.fields(self):
            name, value, limits = flag(f.name), getattr(self, f.name), f.metadata
            low, high, choices = limits["low"], limits["high"], limits["choices"]
            if choices and value not in choices:
                raise WrongCommand(f"{name} {value}: give one of {choices}")
            ends = value if f.type is tuple else (value,)
            if f.type is not str and not low <= ends[0] <= ends[-1] <= high:
                raise WrongCommand(f"{name} {value}: give {low} to {high}, of two the lower first")
        if 0 < self.correction_share < 1 and self.corrections in (0, self.batch_size):
            raise WrongCommand("--batch-size: too small for this --correction-share")
        if self.is_guided and not (self.label_dropout or self.teacher):
            raise WrongCommand("--label-dropout: guidance needs a null label, give more than 0")
        if self.stage == "teacher" and (self.teacher or self.student):
            raise WrongCommand("--stage teacher trains one: remove --teacher and --student")
        if self.recipe == "fast" and self.dataset != "toy2d":
            raise WrongCommand("--recipe fast: only for toys; --prediction solver has its loss")
        if self.hidden_size % (4 * self.num_heads):
            raise WrongCommand("--hidden-size: give a multiple of 4 x --num-heads")
        # In bfloat16 a difference of near values and the exact velocity have few correct digits.
        if self.precision == "bfloat16" and (self.prediction == "difference" or self.exact_teacher):
            raise WrongCommand("--prediction difference, --exact-teacher: give --precision float32")
        if self.guidance > self.guidance_max:
            raise WrongCommand(f"--guidance {self.guidance}: give 1 to {self.guidance_max}")

    @property
    def corrections(self):
        """Rows of a batch that correct."""
        return round(self.batch_size * self.correction_share)

    @property
    def is_guided(self):
        """Whether the strength of guidance is an input of the student."""
        return self.guidance_max > 1


# What some commands get. The paper gives these settings of recipe paper (alpha: 0.3 to 3 work),
# r_location, and correction_interval in PICTURES. The rest is ours.
#     command            recipe  prediction  decay k  alpha  correction_share
#     toy2d              fast    solver      0.5      0.3    0.125
#     toy2d              paper   jvp         1        0.3    0.25
#     mnist --quick      paper   jvp         1        0.3    0.25
#     mnist, imagenet    paper   jvp         1        1      0.25

# Toys train mostly without labels, which is harder. t_location: edges are learned at small t.
TOY = {"label_dropout": 0.9, "t_location": -0.8, "alpha": 0.3, "teacher_steps": 1000, "steps": 5600,
       "teacher_learning_rate": 8e-3, "learning_rate": 3e-3, "critic_learning_rate": 2e-3}
# The sizes of DiT-S/2. A file of --teacher has its own.
PICTURES = {"patch_size": 2, "hidden_size": 384, "depth": 12, "num_heads": 6, "ema_decay": 0.999,
            "guidance_max": 4.0, "guidance": 2.0, "correction_interval": (0.0, 0.7),
            "precision": "bfloat16", "eval_samples": 5000}
PRESETS = {"toy2d": TOY, "mnist": PICTURES,
           "cifar10": {**PICTURES, "teacher_steps": 200000, "steps": 100000},
           "imagenet": {**PICTURES, "teacher_steps": 400000, "teacher_learning_rate": 1e-4,
                        "steps": 100000, "guidance_max": 3.0, "guidance": 1.4, "ema_decay": 0.9999,
                        "eval_samples": 2000, "activation_checkpointing": True}}
RECIPES = {"paper": {},  # nothing beyond PRESETS
           "fast": {"prediction": "solver", "decay": 0.5, "delta_scale": 2.0, "ema_target": True,
                    "correction_share": 0.125, "steps": 1400, "learning_rate": 0.01}}  # for toys
# Minutes on two cores. With these learning rates alpha 1 is unstable on digits.
SMALL = {"hidden_size": 96, "depth": 4, "num_heads": 3, "patch_size": 4, "batch_size": 32,
         "teacher_steps": 5000, "teacher_learning_rate": 2e-3, "steps": 4000, "eval_samples": 500,
         "learning_rate": 2e-3, "critic_learning_rate": 2e-3, "ema_decay": 0.995, "alpha": 0.3,
         "precision": "float32"}
QUICK = {"toy2d": {"teacher_steps": 300, "steps": 300}, "mnist": SMALL, "cifar10": SMALL}


def make_config(dataset="toy2d", recipe="", quick=False, **given):
    """The settings of a data set. recipe: "paper" or "fast". A later one wins: Config's defaults,
    PRESETS (the data), RECIPES (the algorithm), QUICK (the size), dropout for guidance, given."""
    recipe = recipe or ("fast" if dataset == "toy2d" else "paper")
    sizes = QUICK.get(dataset, {}) if quick else {}
    settings = {**PRESETS[dataset], **RECIPES[recipe], **sizes}
    if given.get("guidance_max", 1) > 1:
        settings["label_dropout"] = 0.1  # guidance needs labels, also in toys
    return Config(dataset=dataset, recipe=recipe, quick=quick, **{**settings, **given})


# 6. Training -------------------------------------------------------------------------------------
# torchrun sets these. Without torchrun the environment may hold an old RANK.
LAUNCH = os.environ if distributed.is_torchelastic_launched() else {}
RANK = int(LAUNCH.get("RANK", 0))  # process 0 of WORLD writes the files
WORLD = int(LAUNCH.get("WORLD_SIZE", 1))
WARMUP = 100  # steps in which the learning rate rises
CLIP = 1.0  # largest norm of the gradient of a network
LOG_INTERVAL = 50  # steps between lines of the log
CHECKPOINT_INTERVAL = 500  # steps that a killed run loses at most; a multiple of LOG_INTERVAL
# Beside the progress bar, and as curves: {metric: title}.
SHOWN = {"flow_matching": "teacher: flow matching loss",
         "prediction": "student: prediction residual² / d",
         "correction": "critic: v_N - u, ||D_N||² / d",
         "endpoint_error": "student: endpoint error"}
TEACHER, STUDENT, WEIGHTS, EVALUATION, SAMPLING = range(5)  # streams of random numbers


def generator(*key):
    """A random generator that depends only on the integers in `key`: seed, stream, step. So a run
    that continues has the same numbers. Each process draws the whole batch and takes its rows:
    the number of processes changes results by rounding only."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def mean_over_processes(v):
    """The mean of a tensor over all processes, the same in each. It also waits for all of them."""
    v = v / WORLD
    if WORLD > 1:
        distributed.all_reduce(v)
    return v


class SolverDistiller(Distiller):
    """The form solver, ours, of recipe fast. (It was tried on toys only.) In place of D_G it has
    (f(z, delta) - end) / delta: f(z, delta) moves to `end`, from the student's f(z, delta - h) by h
    along the teacher's ODE. (For small h, without ema_target, this is about (h / delta) D_G.)
    Why it needs fewer steps: where f(z, delta - h) is right, `end` is right too, further by a long
    h. (A row costs 8 evaluations of u; with as many, jvp is nearly as good.) In recipe fast half of
    the rows that predict have delta = 1, where samples come from."""

    ema_student = None  # set by train for ema_target: a FlowMap of averaged weights

    def draw(self, step):
        config, batch = self.config, super().draw(step)
        delta = (config.delta_scale * batch["delta"]).clamp(1e-3, 1)  # residual divides by it
        g = generator(config.seed, STUDENT, step, 1)  # not the numbers of super
        h = config.solver_interval * (1 + torch.rand(len(delta), generator=g)) / 2
        return {**batch, "delta": delta, "h": torch.minimum(h, delta)}  # if h = delta, start is z

    @torch.no_grad()
    def residual(self, student, u, F, z, delta, y, guidance, h):
        start = (self.ema_student or student).f(z, delta - h, y, guidance)  # a shorter jump
        end = solve_ode(u, start, self.config.solver_steps, "rk4", y, t=1 - delta + h, length=h)
        return F - (end - z) / expand(delta)  # (f - end) / delta


def make_distiller(teacher, config, exact=None, start=None):
    """A Distiller whose student and critic start as copies of the network `teacher`. exact: a
    velocity to learn, if not the teacher's. start: a network to start the student from."""
    network = DiT.from_teacher(start or teacher, config.is_guided)
    critic = DiT.from_teacher(teacher, config.is_guided) if config.corrections else None
    kind = SolverDistiller if config.prediction == "solver" else Distiller
    return kind(network, critic, exact or teacher, config).to(next(teacher.parameters()).device)


class TrainState:
    """Networks, average, optimizer, step and log. path: a checkpoint to continue, if it exists."""

    def __init__(self, module, config, path=None):
        self.step, self.skipped, self.log = 0, 0, []  # skipped: consecutive ones
        self.ema = copy.deepcopy(module.network).requires_grad_(False)
        self.device = next(self.ema.parameters()).device
        trained = {k: getattr(module, k) for k in ("network", "critic") if getattr(module, k, None)}
        # requires_grad_: load_student's network is frozen.
        groups = [{"params": v.requires_grad_().parameters()} for v in trained.values()]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        self.parts = {**trained, "ema": self.ema, "optimizer": self.optimizer}  # of a checkpoint
        for network in [*module.modules(), self.ema]:  # student, critic, teacher, average
            if isinstance(network, DiT):
                network.activation_checkpointing = config.activation_checkpointing
                if config.compile:
                    network.compile()
        if path and path.exists():
            with explained(f"{path} cannot be continued: give another --out"):
                saved = torch.load(path, "cpu", weights_only=True)
                for name, part in self.parts.items():
                    part.load_state_dict(saved[name])
                self.step, self.log = saved["step"], saved["log"]
        # Process 0 alone writes. One that cannot see its folder would start again.
        if abs(mean_over_processes(torch.tensor([self.step]).double()) - self.step) > 1e-6:
            raise UserError(f"{path} differs between processes: give a folder that all share")

    def update(self, loss, config):
        """Update the weights by .grad, then the average, unless .grad or the loss is not finite."""
        groups = self.optimizer.param_groups  # one for each network that is trained
        norms = [nn.utils.clip_grad_norm_(group["params"], CLIP) for group in groups]
        is_finite = torch.stack([loss, *norms]).isfinite().all()
        self.skipped = 0 if is_finite else self.skipped + 1
        if is_finite:
            rise = min(1, (self.step + 1) / WARMUP)
            for group, peak in zip(groups, (config.learning_rate, config.critic_learning_rate)):
                group["lr"] = peak * rise * (1 - self.step / config.steps)
            self.optimizer.step()
            # At first ema averages about the last tenth of the steps so far.
            kept = min(config.ema_decay, (1 + self.step) / (10 + self.step))
            get_ema_multi_avg_fn(kept)([*self.ema.parameters()], groups[0]["params"], None)
        self.optimizer.zero_grad()
        self.step += 1

    def write(self, path, config):
        """Process 0 writes a checkpoint and the log. path: ends in teacher.pt or student.pt."""
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        checkpoint = {"kind": path.stem, "config": vars(config), "log": self.log,
                      "settings": getattr(self.ema, "settings", {}), "step": self.step, **parts}
        if RANK == 0:
            save(path, lambda file: torch.save(checkpoint, file))
            path.with_suffix(".json").write_text(json.dumps(self.log, indent=1))
        mean_over_processes(torch.zeros(1))  # wait: if one ends early, torchrun kills process 0


def train(module, config, state=None):
    """Train module.network, and module.critic if there is one, up to config.steps. A generator: it
    yields (step, metrics, state) after every step, from 1 on. state.ema is the averaged network.

    module.draw(step) -> {name: tensor, one row for each sample}. module(**batch) -> scalar loss,
    {name: scalar tensor}. state: the one that an earlier train of this module yielded, to go on.
    Loss, gradients and metrics are means over processes and micro-batches of equally many rows.
    A step that is not finite is skipped; ten consecutive ones raise UserError."""
    state = state or TrainState(module, config)
    if config.ema_target:
        module.ema_student = FlowMap(state.ema)
    # Why DDP wraps the loss: it averages gradients only if its own forward is called. The loss
    # calls module.network, so wrapping that alone would average nothing, with no warning.
    parallel = module
    if WORLD > 1:  # bucket_view: no second copy of the gradients
        parallel = nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True)
    count = config.micro_batches
    while state.step < config.steps:
        batch, values = module.draw(state.step), []  # values: loss and metrics of each part
        for offset in range(RANK * count, (RANK + 1) * count):
            # delta is ordered, so a part takes every n-th row, not n consecutive ones.
            part = {name: v[offset :: WORLD * count].to(state.device) for name, v in batch.items()}
            with torch.autocast(state.device.type, torch.bfloat16, config.precision == "bfloat16"):
                loss, metrics = parallel(**part)
            # DDP averages all of .grad. The sum of earlier parts is the same in all, so it stays.
            (loss / count).backward()
            values.append(torch.stack([loss, *metrics.values()]).detach())
        loss, *means = mean_over_processes(torch.stack(values).mean(0))
        state.update(loss, config)
        if state.skipped >= 10:
            raise UserError(f"step {state.step}: ten consecutive steps are not finite: lower the "
                            "learning rate, and give this run's --out to keep its checkpoints")
        metrics = dict(zip(metrics, means), skipped=torch.tensor(float(state.skipped > 0)))
        yield state.step, metrics, state


# 7. Measures -------------------------------------------------------------------------------------
PATH_STEPS = 32  # RK4 steps to the teacher's endpoints; large sets of samples take SET_STEPS
SET_STEPS = 8


def in_batches(f, z, y):
    """f(z, y), moved to the CPU, in parts to save memory. y: (B,) or (1,). Raises UserError."""
    rows = max(1, min(4000, 2**17 // z[0].numel()))
    parts = zip(z.split(rows), y.expand(len(z)).split(rows))
    x = torch.cat([f(*part).cpu() for part in parts])
    if not x.isfinite().all():
        raise UserError("samples are not finite: lower the learning rate, with another --out")
    return x


def draw_noise(network, N, g=None):
    """Noise for N samples, (N, C, H, W), drawn on the CPU: the same for all devices."""
    return torch.randn(N, *network.shape, generator=g).to(next(network.parameters()).device)


@torch.no_grad()
def jump(student, z, y=None, guidance=None, delta=1.0):
    """f(z, delta), by default samples, no graph. y, guidance: (B,), (1,), None; delta: a number."""
    return student.f(z, z.new_tensor([delta]), y, guidance)


def sample(student, N, y=None, guidance=None, generator=None):
    """N one-step samples (N, C, H, W). y, guidance: (N,), (1,) or None."""
    return jump(student, draw_noise(student.network, N, generator), y, guidance)


def student_path(student, z, points, y=None, guidance=None):
    """f(z, i / points) for i = 0 ... points, each a jump from z: (points + 1, B, C, H, W)."""
    return torch.stack([jump(student, z, y, guidance, i / points) for i in range(points + 1)])


def search_noise(student, reward, N, y=None, guidance=None, generator=None, keep=1):
    """The `keep` of N noises whose samples have the largest rewards, best first. The paper's
    inference-time scaling: one evaluation a noise, and the teacher has nearly the same samples, if
    the endpoint error is small. reward: (N, C, H, W) -> (N,). y, guidance: (1,) or None."""
    z = draw_noise(student.network, N, generator)
    rewards = reward(jump(student, z, y, guidance)).view(N)
    return z[rewards.topk(keep).indices]


def relative_error(found, truth):
    """sqrt(E||found - truth||^2 / E||truth - mean truth||^2): in units of the truth's spread."""
    variance = (truth - truth.mean(0)).square().mean()
    return ((found - truth).square().mean() / variance).sqrt().item()


def sliced_w2(a, b, count=128):
    """Sliced 2-Wasserstein distance of two sets (N, ...): root mean square, over `count` fixed
    directions, of the distance between sorted projections. Both sets need N samples."""
    directions = nnf.normalize(torch.randn(a[0].numel(), count, generator=generator(0)), dim=0)
    a, b = ((v.flatten(1) @ directions.to(v)).sort(0).values for v in (a, b))
    return (a - b).square().mean().sqrt().item()


def draw_inputs(network, config, N, g):
    """N noises, labels 0, 1, 2, ... in turn (N,) or the null label (1,), strength (1,) or None."""
    z = draw_noise(network, N, g)
    y = torch.arange(N, device=z.device) % max(1, network.num_classes)
    if config.is_guided:
        return z, y, z.new_tensor([config.guidance])
    if config.label_dropout > 0.5:  # trained mostly without labels: measured so too
        y = y.new_tensor([network.num_classes])
    return z, y, None


def endpoint_score(teacher, network, config):
    """Returns score(learned), a student's endpoint error. The teacher's paths are solved once."""
    N = max(64, 2000 // math.prod(network.shape))
    z, y, strength = draw_inputs(network, config, N, generator(config.seed, EVALUATION, 0))
    u = guided(teacher, strength, config.guidance_interval)
    phi = solve_ode(u, z, PATH_STEPS, "rk4", y)
    return lambda learned: relative_error(jump(FlowMap(learned), z, y, strength), phi)


def evaluate(student, teacher, data, config, out, log):
    """Compare student and teacher: metrics.json, pictures, and the main numbers on the screen.
    Endpoint error: from f(z, 1) to phi(z, 1). SW2: from the student's samples to the teacher's of
    other z, divided by that of two sets of the teacher; "SW2 to data", by that of two of data."""
    N, network, g = config.eval_samples, student.network, generator(config.seed, EVALUATION, 1)
    z, y, strength = draw_inputs(network, config, N, g)
    u = guided(teacher, strength, config.guidance_interval)
    few = slice(max(128, 2000 // math.prod(network.shape)))
    path = solve_ode(u, z[few], PATH_STEPS, "rk4", y[few], return_path=True).cpu()
    jumps = student_path(student, z[few], PATH_STEPS, y[few], strength).cpu()
    errors = [relative_error(a, b) for a, b in zip(jumps, path)]
    samples = in_batches(lambda z, y: jump(student, z, y, strength), z, y)
    ends = in_batches(lambda z, y: solve_ode(u, z, SET_STEPS, "rk4", y), z, y)
    other_z = draw_noise(network, N, g)
    other_ends = in_batches(lambda z, y: solve_ode(u, z, SET_STEPS, "rk4", y), other_z, y)
    nfe = SET_STEPS * METHODS["rk4"] * (1 + config.is_guided)
    sets = {f"teacher: {nfe} evaluations": ends, "student: 1 evaluation": samples}
    floor = sliced_w2(ends, other_ends)
    ratio = sliced_w2(samples, other_ends) / floor
    metrics = {"endpoint_error": errors[-1], "error_along_path": errors, "sw2_floor": floor,
               "sw2_ratio": ratio, "log": log, "teacher_nfe": nfe, "config": vars(config)}
    print(f"endpoint error {errors[-1]:.4f} of the spread (0 is exact); SW2 {ratio:.3f} times its "
          f"floor (1 is the goal); 1 evaluation instead of {nfe}")
    if data is not None:
        x, other_x = data.draw(2 * N, generator(config.seed, EVALUATION, 2))[0].chunk(2)
        sets = {"data": x, **sets}
        data_floor = sliced_w2(x, other_x) or 1.0  # 0 if all data is the same
        for title, drawn in sets.items():
            name = title.split(":")[0]
            covered = data.coverage(drawn) if data.has_velocity else {}
            metrics[name] = {"SW2 to data": sliced_w2(drawn, other_x) / data_floor, **covered}
            print(f"{name:>8}:", ", ".join(f"{k} {v:.3f}" for k, v in metrics[name].items()))
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1))
    plot_samples(sets).savefig(out / "comparison.png", dpi=120)
    plot = plot_paths if path.shape[-1] == 1 else plot_filmstrip
    plot(path, jumps).savefig(out / "paths.png", dpi=120)
    plot_error(errors).savefig(out / "error.png", dpi=120)
    plot_losses(log).savefig(out / "losses.png", dpi=120)
    animate_paths(path, jumps).save(out / "paths.gif", writer="pillow", fps=10, dpi=86)
    print(f"pictures and metrics.json are in {out}")


# 8. Pictures -------------------------------------------------------------------------------------
# From tensors on the CPU to a Figure, which a notebook shows after %matplotlib inline.
COLORS = {"data": "#4d4d4d", "teacher": "#2166ac", "student": "#e08214", "critic": "#7b3294"}
# Noise and toys have a spread near 1, so one view shows nearly all points.
PLANE = {"xticks": [], "yticks": [], "xlim": (-2.6, 2.6), "ylim": (-2.6, 2.6), "aspect": "equal"}


def plot_samples(samples, figure=None):
    """Samples (N, C, H, W) by title, side by side: 4000 points, or 36 pictures in [-1, 1]. The
    first word of a title, as in "teacher: 32 evaluations", chooses the colour of points."""
    figure = figure or Figure((4 * len(samples), 4.3), layout="constrained")
    for i, (title, x) in enumerate(samples.items(), 1):
        axis = figure.add_subplot(1, len(samples), i, title=title, xticks=[], yticks=[])
        if x.shape[-1] == 1:
            color = COLORS.get(title.split(":")[0])
            axis.scatter(*x[:4000].flatten(1).T, s=3, lw=0, alpha=0.6, color=color)
            axis.set(**PLANE)
            continue
        if x.shape[1] not in (1, 3):  # latents
            x = x[:, [0, 1, 2 % x.shape[1]]] / 2
        grid = utils.make_grid(x[:36], 6, 1, normalize=True, value_range=(-1, 1), pad_value=1)
        axis.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
    return figure


def plot_filmstrip(teacher_path, student_path):
    """The first six of the teacher's paths and of f(z, delta), each a row. (steps, B, C, H, W)."""
    at = np.linspace(0, len(teacher_path) - 1, 6, dtype=int)
    paths = {"teacher: ODE, δ from 0 to 1": teacher_path, "student: f(z, δ)": student_path}
    return plot_samples({k: v[at, :6].transpose(0, 1).flatten(0, 1) for k, v in paths.items()})


def plot_paths(teacher_path, student_path, lines=40):
    """The first `lines` of the teacher's paths, f(z, delta) over them, (steps, B, 2, 1, 1)."""
    teacher = teacher_path[:, :lines, :, 0, 0].permute(2, 0, 1)  # (2, steps, lines)
    student = student_path[:, :lines, :, 0, 0].permute(2, 0, 1)
    axis = Figure((7, 7.3), layout="constrained").subplots()
    axis.scatter(*teacher_path[-1].flatten(1).T, s=4, lw=0, color=COLORS["teacher"], alpha=0.15)
    axis.plot(*teacher, "o-", markevery=[-1], lw=4, ms=8, alpha=0.4, color=COLORS["teacher"])
    axis.plot(*student, "o-", markevery=[-1], lw=1.2, ms=4, color=COLORS["student"])
    axis.plot(*teacher[:, 0], "o", ms=4, color="black")
    first_of_each = axis.lines[:: teacher.shape[2]]
    axis.legend(first_of_each, ["teacher", "student", "noise z"], loc="upper left")
    axis.set(title="Teacher's ODE path and student's jumps f(z, δ), same noises", **PLANE)
    return axis.figure


def plot_error(errors):
    """The student's errors, a list over even steps of delta from 0 to 1."""
    axis = Figure((6.5, 4.2), layout="constrained").subplots()
    axis.plot(np.linspace(0, 1, len(errors)), errors, lw=2.5, color=COLORS["student"])
    axis.set(title=f"Distance from student to teacher: {errors[-1]:.4f} at δ = 1",
             xlabel="δ: 0 is noise, 1 is data", ylabel="error / spread of the teacher's states")
    return axis.figure


def plot_losses(log):
    """The curves of SHOWN, from the lines of a log."""
    figure = Figure((16, 3.6), layout="constrained")
    for axis, (name, title) in zip(figure.subplots(1, len(SHOWN)), SHOWN.items()):
        curve = {line["step"]: line[name] for line in log if name in line}
        axis.plot([*curve], [*curve.values()], color=COLORS[title.split(":")[0]])
        scale = "linear" if name == "flow_matching" else "log"  # a loss whose minimum is not 0
        axis.set(title=title, xlabel="step", yscale=scale)
    return figure


def animate_paths(teacher_path, student_path, frames=20):
    """Noise becoming data along both paths, (steps, B, C, H, W): an animation."""
    figure = Figure((7.2, 4), layout="constrained")
    steps = np.linspace(0, len(teacher_path) - 1, frames, dtype=int).tolist()

    def show(i):
        figure.clear()
        delta = f"δ = {i / steps[-1]:.2f}"
        plot_samples({f"teacher: ODE up to {delta}": teacher_path[i],
                      f"student: one jump to {delta}": student_path[i]}, figure)

    return FuncAnimation(figure, show, frames=steps + steps[-1:] * 5)  # the end is held


# 9. Files -----------------------------------------------------------------------------------------
@contextlib.contextmanager
def explained(advice):
    """Within it any exception becomes a UserError that says what to do."""
    try:
        yield
    except Exception as e:
        raise UserError(f"{advice} ({type(e).__name__}: {str(e)[:300]})") from e


def save(path, write):
    """Call write(file). The file at `path` is then replaced as a whole, or not at all."""
    part = path.with_name(f"{path.name}.part")
    with explained(f"{path}: free some space or give another --out"), contextlib.ExitStack() as end:
        end.callback(part.unlink, missing_ok=True)  # what an error leaves
        with open(part, "wb") as file:
            write(file)
        part.replace(path)


def load_points(path):
    """The rows of an N x 2 array as narrow Gaussians, in standard units. Raises UserError."""
    with explained(f"--toy {path}: give one of {TOYS} or FILE.npy, N x 2 finite numbers that vary"):
        points = np.load(path).astype(np.float64)
        scale = points.std(0)  # of equal numbers it may be 1e-15, and ptp is 0
        if points.shape[1:] != (2,) or not np.isfinite(scale).all() or not np.ptp(points, 0).all():
            raise ValueError(f"shape {points.shape}, standard deviations {scale}")
    scale = np.where(scale.max() < 5 * scale.min(), scale.max(), scale)  # one for x and y, if near
    means = torch.as_tensor((points - points.mean(0)) / scale, dtype=torch.float32)
    labels = torch.zeros(len(means), dtype=torch.int64)
    return GaussianMixture(means, 0.05, labels, 0, points.mean(0).tolist(), scale.tolist())


def load_latents(path):
    """Latents FILE.npy (N, C, S, S), which stay on the disk, and labels FILE_labels.npy (N,)."""
    x = np.load(path, mmap_mode="r")
    y = np.load(path.removesuffix(".npy") + "_labels.npy")
    shapes_fit = x.ndim == 4 and x.shape[2] == x.shape[3] > 1 and y.shape == x.shape[:1]
    spread = x[:: math.ceil(len(x) / 256)].astype(np.float32).std()
    if not shapes_fit or x.dtype.kind != "f" or not 0.4 < spread < 2.5 or x.shape[1] == 8:
        raise ValueError(f"{x.dtype}, shape {x.shape}, deviation {spread:.3g}, labels of shape "
                         f"{y.shape}; 8 channels are means and deviations: sample them")
    classes, y = np.unique(y, return_inverse=True)
    if RANK == 0:
        print(f"{path}: {len(classes)} classes, here from 0 on: {classes[0]} to {classes[-1]}")
    return ImageData(x, y, len(classes))


def open_data(config):
    """The data of a run; MNIST and CIFAR-10 are downloaded if need be. Raises UserError."""
    if config.dataset == "toy2d":
        return make_toy(config.toy) if config.toy in TOYS else load_points(config.toy)
    if config.dataset == "imagenet":
        with explained("give a --teacher, or --data FILE.npy, scaled as by encode in README.md"):
            return load_latents(config.data)
    with explained(f"--data {config.data}: go online, or give a folder with {config.dataset}"):
        source = {"mnist": datasets.MNIST, "cifar10": datasets.CIFAR10}[config.dataset]
        if RANK == 0:  # one process downloads, the others wait
            source(config.data, download=True)
        mean_over_processes(torch.zeros(1))
        found = source(config.data)
    x = np.asarray(found.data).reshape(*found.data.shape[:3], -1).transpose(0, 3, 1, 2)  # NCHW
    if config.dataset == "cifar10":  # and its mirror images
        return ImageData(np.concatenate([x, x[..., ::-1]]), 2 * list(found.targets), 10)
    return ImageData(x, found.targets, 10)


def load_network(path, kind, device="cpu", teacher_format="", num_heads=0):
    """The averaged network of a checkpoint, frozen, and the checkpoint. Raises UserError."""
    with explained(f"{path} cannot be used as a {kind}: give another file, other flags or --out"):
        torch.serialization.add_safe_globals([argparse.Namespace])  # settings of SiT and REPA
        file = torch.load(path, "cpu", weights_only=True)
        if kind == "teacher" and "kind" not in file:
            file = read_public(file, teacher_format, num_heads)
        if file.get("kind", kind) != kind:
            raise ValueError(f"it is a {file['kind']}")
        if not all(v.isfinite().all() for v in file["ema"].values()):
            raise ValueError("its weights are not all finite")
        with torch.device("meta"):  # random weights would take time
            network = DiT(**file["settings"])
        network.load_state_dict({k: v.float() for k, v in file["ema"].items()}, assign=True)
    return network.to(device).requires_grad_(False), file


def load_teacher(path, device="cpu", teacher_format="", num_heads=0):
    """A DiT, called as u(x, t, y), from a teacher.pt. Or from a public file: then teacher_format is
    "sit" or "repa", and num_heads 0 if it is not known. Raises UserError."""
    return load_network(path, "teacher", device, teacher_format, num_heads)[0]


def load_student(path, device="cpu"):
    """A FlowMap from a student.pt. Raises UserError."""
    return FlowMap(load_network(path, "student", device)[0])


# SiT (arXiv 2401.08740) and REPA (arXiv 2410.06940) are DiTs of the same tensor names, so the user
# tells which it is. What differs goes into the weights: u(x, t) is SiT(x, 1 - t) or -REPA(x, t).
FIRST = "x_embedder.proj.weight"  # a tensor that every DiT has


def find_tensors(file):
    """Returns (prefix, tensors) of the only network in a file, or the only averaged one, also in
    nested dicts. prefix: all before FIRST, such as "ema.module.". Raises ValueError otherwise."""
    flat = dict(file)
    while nested := [name for name, v in flat.items() if isinstance(v, dict)]:
        for name in nested:
            flat |= {f"{name}.{key}": v for key, v in flat.pop(name).items()}
    prefixes = [name.removesuffix(FIRST) for name in flat if name.endswith(FIRST)]
    marks = [name.count("ema") + name.count("shadow") for name in prefixes]
    if marks.count(max(marks, default=0)) != 1:
        raise ValueError(f"{FIRST} is in {prefixes}: give a file with one DiT, or one average")
    prefix = prefixes[marks.index(max(marks))]
    return prefix, {k.removeprefix(prefix): v for k, v in flat.items() if k.startswith(prefix)}


def read_public(file, teacher_format="", num_heads=0):
    """A SiT or REPA file as if it were a teacher.pt, with its "format". Raises ValueError."""
    prefix, tensors = find_tensors(file)
    if teacher_format not in ("sit", "repa"):
        raise ValueError("give --teacher-format sit or repa")
    args = file.get("args") or {}  # a Namespace or a dict
    settings = {**file, **getattr(args, "__dict__", args)}
    velocity = {"sit": "velocity", "repa": "v"}[teacher_format]  # its name in their settings
    found = f"{settings.get('prediction', velocity)}, {settings.get('path_type', 'linear')}".lower()
    if found != f"{velocity}, linear":
        raise ValueError(f"trained for {found}, not {velocity}, linear: is --teacher-format right?")
    outputs = "final_layer.linear.weight", "final_layer.linear.bias"
    if teacher_format == "sit":
        # At 1 - t, SiT's first layer computes A cos(w - wt) + B sin(w - wt), which is
        # (A cos w + B sin w) cos wt + (A sin w - B cos w) sin wt. The brackets are weights at t.
        w = torch.exp(-math.log(10000) / 128 * torch.arange(128, dtype=torch.float64))
        A, B = tensors["t_embedder.mlp.0.weight"].double().split(128, 1)
        tensors["t_embedder.mlp.0.weight"] = torch.cat(
            [A * w.cos() + B * w.sin(), A * w.sin() - B * w.cos()], 1)
        _, C, p, _ = tensors[FIRST].shape
        for name in outputs:  # rows: 2 C channels of each pixel, the second C are not used
            tensors[name] = tensors[name].unflatten(0, (p * p, -1))[:, :C].flatten(0, 1)
    else:
        encoder = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
        tensors = {k: v for k, v in tensors.items() if not k.startswith("projectors.")}  # unused
        for name in [k for k in tensors if k.startswith("decoder_blocks.")]:
            _, i, rest = name.split(".", 2)  # older files: the blocks after the encoder's
            tensors[f"blocks.{encoder + int(i)}.{rest}"] = tensors.pop(name)
        for name in outputs:
            tensors[name] = -tensors[name]
    table = tensors["y_embedder.embedding_table.weight"]
    has_null = len(table) != settings.get("num_classes", 1000)  # of ImageNet
    if not has_null:  # give it a row, never used
        tensors["y_embedder.embedding_table.weight"] = torch.cat([table, table.mean(0)[None]])
    return {"format": f"{teacher_format} {prefix}".strip(" ."),
            "config": vars(Config(dataset="imagenet", label_dropout=float(has_null))),
            "ema": tensors, "settings": infer_settings(tensors, num_heads)}


def infer_settings(tensors, num_heads=0):
    """Settings of a DiT with these tensors. Heads, if no tensor tells them, as in SiT and REPA."""
    E, C, p, _ = tensors[FIRST].shape
    heads = num_heads or (16 if E == 1152 else max(1, E // 64))  # XL has 16
    if E % heads:
        raise ValueError(f"--num-heads {heads} does not divide the width {E}")
    qk_norm = "blocks.0.attn.q_norm.weight" in tensors
    if qk_norm:
        heads = E // len(tensors["blocks.0.attn.q_norm.weight"])
    return {"input_size": p * math.isqrt(tensors["pos_embed"].shape[1]), "in_channels": C,
            "num_classes": len(tensors["y_embedder.embedding_table.weight"]) - 1,
            "hidden_size": E, "num_heads": heads, "patch_size": p, "qk_norm": qk_norm,
            "depth": sum(name.endswith(".attn.qkv.weight") for name in tensors)}


# 10. Runs and the command line --------------------------------------------------------------------
def make_parser():
    """A flag for every field of Config. The help shows the defaults of toys."""
    parser = argparse.ArgumentParser("fmd.py", "python fmd.py [flags]", __doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda text: parser.exit(2, f"fmd: {text}; python fmd.py --help lists flags\n")
    special = {bool: {"action": argparse.BooleanOptionalAction},
               tuple: {"type": float, "nargs": 2, "metavar": ("LOW", "HIGH")}}
    for f, default in zip(dataclasses.fields(Config), vars(make_config()).values()):
        extra = special.get(f.type, {"type": f.type, "choices": f.metadata["choices"]})
        text = f.metadata["help"] + (f" (toys: {default})" if default != "" else "")
        parser.add_argument(flag(f.name), default=argparse.SUPPRESS, help=text, **extra)
    return parser


# Settings of the machine and of samples: they do not name a run's folder, and may change in a run.
UNNAMED = {"stage", "out", "debug", "teacher_format", "trust_teacher", "guidance", "device",
           "compile", "micro_batches", "activation_checkpointing", "eval_samples", "samples",
           "sample_seed", "classes"}
# With --out learning rates may change too, to go on after steps that are not finite.
MAY_CHANGE = UNNAMED | {"learning_rate", "teacher_learning_rate", "critic_learning_rate"}


def name_folder(given):
    """The folder of a run: --out, or its data set and flags, as in runs/toy2d_seed=3_toy=moons."""
    dataset = given.get("dataset", "distilled" if "teacher" in given else Config.dataset)
    flags = [f"{k}={v}" for k, v in sorted(given.items()) if k not in UNNAMED | {"dataset"}]
    name = re.sub(r"(?a)[^\w.=]", "-", "_".join([dataset, *flags]))[:200]  # fits file systems
    return Path(given.get("out") or f"runs/{name}")


def check_settings(where, theirs, mine, may_differ=()):
    """Raises UserError if a setting is in `theirs`, of a folder or file, and differs in `mine`."""
    for name, v in mine.items():  # array_equal: an interval is a tuple or, from a flag, a list
        if name not in may_differ and not np.array_equal(theirs.get(name, v), v):
            raise WrongCommand(f"{where} has {flag(name)} {theirs[name]!r}, not {v!r}: "
                               "give the same settings, or another --out or --teacher")


def new_network(data, config):
    """A DiT for this data. Its first weights follow from the seed. Raises UserError."""
    if data.shape[1] % config.patch_size:
        raise WrongCommand(f"--patch-size {config.patch_size} does not divide {data.shape[1]}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(config.seed, WEIGHTS).initial_seed())
        return DiT(data.shape[1], data.shape[0], data.num_classes, config.hidden_size, config.depth,
                   config.num_heads, config.patch_size, **data.coordinates)


def open_teacher(given, device):
    """The network of --teacher. Adds the settings that it fixes to `given`. Raises UserError."""
    network, file = load_network(given["teacher"], "teacher", device,
                                 given.get("teacher_format", ""), given.get("num_heads", 0))
    if RANK == 0:
        print(f"{given['teacher']}: {file.get('format', 'fmd')}, {network.settings}")
    # A file read in a wrong way still gets good scores (they compare the student with it), but its
    # samples show it. In noise, neighbours differ by sqrt(2) spreads, in data by less than 1. With
    # the wrong sign of u, samples are near 2 z - x.
    if "format" in file and not given.get("trust_teacher"):
        y = torch.arange(16, device=device) % max(1, network.num_classes)
        x = solve_ode(network, draw_noise(network, 16, generator(0)), 8, y=y)
        spread = x.std().item()
        roughness = x.diff().std().item() / spread
        if not (0.2 < spread < 1.7 and roughness < 1.3):
            raise UserError(f"samples do not look like data ({spread=:.2f}, {roughness=:.2f}): "
                            "try another --teacher-format or --num-heads, or --trust-teacher")
    # Settings that the file fixes. A flag may repeat them, not change them.
    known = {**file["config"], **network.settings}
    names = ["dataset", "toy", "hidden_size", "depth", "num_heads", "patch_size"]
    where = given["teacher"]
    if known.get("label_dropout", 1) == 0:
        where += ", without null label, so without guidance,"
        names += ["label_dropout", "guidance_max", "guidance"]
    fixed = {name: known[name] for name in names}
    check_settings(where, fixed, given)
    given.update(fixed)
    return network


def run_training(given, device):
    """Train a teacher, distill it, compare the two. What cannot work is refused before."""
    out = name_folder(given)
    teacher = open_teacher(given, device) if given.get("teacher") else None
    config = make_config(**given)
    start = load_student(config.student, device).network if config.student else None
    # config.json holds sums of the numbers in files, to notice a file that has changed.
    sources = {name: f"of sum {network.final_layer.linear.weight.cpu().double().sum():.6g}"
               for name, network in (("teacher", teacher), ("student", start)) if network}
    data = open_data(config) if teacher is None or config.dataset == "toy2d" else None
    if data:
        if teacher and not data.coordinates.items() <= teacher.settings.items():
            raise WrongCommand(f"--toy {config.toy}: these are not this teacher's points")
        x, y = data.draw(64, generator(0))
        total = (x.double() * expand(y + 1)).sum()  # depends on the order of labels
        sources["data"] = f"of sum {total:.6g}, {len(data.labels)} rows, {data.coordinates}"
    network = teacher or new_network(data, config).to(device)
    sizes = {**network.settings, "is_guided": config.is_guided}
    if start and (teacher is None or start.settings != sizes):
        raise WrongCommand("--student: give its --teacher too, and its sizes and guidance")
    if config.exact_teacher and not (data and data.has_velocity):
        raise WrongCommand("--exact-teacher: only toys have one, with 2000 points at most")
    parts = WORLD * config.micro_batches
    if config.batch_size % parts or config.corrections % parts:
        raise WrongCommand(f"--batch-size {config.batch_size}, {config.corrections} of it correct: "
                           f"give multiples of {parts}, processes x --micro-batches")
    mine = {**vars(config), **sources}
    with explained(f"{out} cannot be used: give another --out, or wait for its other process"):
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / f"lock{RANK}").acquire(timeout=0)  # free when its process dies
        theirs = json.loads((out / "config.json").read_text()) if any(out.glob("*.pt")) else mine
    with lock:
        check_settings(out, theirs, mine, MAY_CHANGE)  # in every process
        if RANK == 0:
            save(out / "config.json", lambda file: file.write(json.dumps(mine, indent=1).encode()))
        run_stages(network, start, data, config, out)


def run_stages(teacher, start, data, config, out):
    """The stages of a run; a finished one is loaded. teacher: untrained, unless from --teacher."""
    if config.dataset == "toy2d":  # more threads gain nothing
        torch.set_num_threads(1)
    if config.precision == "bfloat16":  # measures stay in float32, with faster products
        torch.set_float32_matmul_precision("high")
    log = []
    if not config.teacher:
        if (out / "student.pt").exists() and not (out / "teacher.pt").exists():
            raise UserError(f"{out}: student.pt is without its teacher.pt: give another --out")
        first = dataclasses.replace(config, steps=config.teacher_steps,
                                    learning_rate=config.teacher_learning_rate)
        teacher, log = run_stage("teacher", FlowMatching(teacher, data, first), first, out)
    if config.stage == "all":
        exact = copy.deepcopy(data) if config.exact_teacher else None  # data stays on the CPU
        distiller = make_distiller(teacher, config, exact, start)
        score = endpoint_score(distiller.teacher, teacher, config)
        network, more = run_stage("student", distiller, config, out, score)
        if RANK == 0:
            evaluate(FlowMap(network), distiller.teacher, data, config, out, log + more)
    elif RANK == 0:
        print(f"teacher.pt is in {out}")


def run_stage(kind, module, config, out, score=None):
    """Train, or go on from out/<kind>.pt (on a CPU to the same bits). Returns the averaged network
    and the log, with score(network). Ctrl-C and SIGTERM: saves, then KeyboardInterrupt."""
    path = out / f"{kind}.pt"
    state = TrainState(module, config, path)
    if RANK == 0 and state.step:
        print(f"{path}: {state.step} of {config.steps} steps are done; to redo them, change --out")
    stride = math.gcd(config.batch_size, config.corrections)  # FLOPs: of every n-th row
    rows = {k: v[::stride].to(state.device) for k, v in module.draw(0).items()}
    with FlopCounterMode(display=False) as counter:
        module(**rows)[0].backward()
    module.zero_grad()
    is_stopped, interrupts = False, []
    recent, clock = [], time.perf_counter()
    signal.signal(signal.SIGINT, lambda number, frame: interrupts.append(number))
    bar = tqdm(train(module, config, state), kind, config.steps, initial=state.step,
               disable=RANK > 0, mininterval=0.1 if sys.stderr.isatty() else 60, maxinterval=60)
    for step, metrics, _ in bar:
        is_stopped = mean_over_processes(torch.tensor(float(len(interrupts)))) > 0
        is_last = is_stopped or step == config.steps
        recent.append(metrics)
        if is_last or step % LOG_INTERVAL == 0:
            seconds = (time.perf_counter() - clock) / len(recent)  # a step
            line = {k: torch.stack([m[k] for m in recent]).nanmean().item() for k in metrics}
            line["samples_per_second"] = config.batch_size / seconds
            line["tflops"] = stride * counter.get_total_flops() / seconds / 1e12
            line["peak_gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
            if RANK == 0 and score:
                line["endpoint_error"] = score(state.ema)
            state.log.append({"stage": kind, "step": step, **line})
            bar.set_postfix({k: line[k] for k in SHOWN if k in line}, refresh=False)
            if is_last or step % CHECKPOINT_INTERVAL == 0:
                state.write(path, config)
            recent, clock = [], time.perf_counter()
        if is_stopped:
            break
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if interrupts or is_stopped:
        raise KeyboardInterrupt(f"{path} holds step {state.step},")
    return state.ema, state.log


def run_sampling(given, device):
    """Draw samples of the student in the folder of these flags: samples.png, and samples.npz (ADM's
    layout): arr_0, uint8 pictures or latents (N, H, W, C), or points (N, 2); arr_1, labels (N,)."""
    if RANK > 0:
        return
    out = name_folder(given)
    network, file = load_network(out / "student.pt", "student", device)
    check_settings(out, file["config"], given, UNNAMED)
    theirs = {k: v for k, v in file["config"].items() if hasattr(Config, k)}  # of this version
    config = Config(**{**theirs, **given})
    N = config.samples
    z, y, strength = draw_inputs(network, config, N, generator(config.sample_seed, SAMPLING))
    if config.classes:
        with explained(f"--classes: {out} has {network.num_classes} labels: give some, as 0,1"):
            labels = [range(network.num_classes).index(int(v)) for v in config.classes.split(",")]
        y = torch.tensor(np.resize(labels, N), device=device)  # repeated in turn
    x = in_batches(lambda z, y: jump(FlowMap(network), z, y, strength), z, y)
    rows = x.permute(0, 2, 3, 1).numpy()
    if config.dataset == "toy2d":  # in the user's coordinates
        rows = rows.reshape(N, 2) * network.settings["scale"] + network.settings["center"]
    elif config.dataset != "imagenet":
        rows = (127.5 * (rows + 1)).clip(0, 255).astype(np.uint8)
    save(out / "samples.npz", lambda file: np.savez(file, rows, y.expand(N).cpu().numpy()))
    plot_samples({"student": x}).savefig(out / "samples.png", dpi=120)
    print(f"{N} samples of step {file['step']} of {config.steps}: samples.npz and .png in {out}")


def main(argv=None):
    """The command line. Returns the exit status: 0 done, 1 failed in running, 2 wrong command."""
    given = {k: v for k, v in vars(make_parser().parse_args(argv)).items() if v != ""}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also after `&` in a script
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))  # as Ctrl-C
    warnings.filterwarnings("ignore", module="torch")  # torch's own, about what jvp uses
    status = 0
    try:
        name = given.get("device", Config.device)
        with explained("--device: not on this machine, or fewer GPUs than processes: give cpu"):
            if WORLD > 1 and name.startswith("cuda"):  # each process takes a GPU of its own
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
                name = "cuda"
            device = torch.zeros(1, device=name).device
        if WORLD > 1:  # gloo also beside NCCL: the flag of an interruption is exchanged on the CPU
            distributed.init_process_group("cpu:gloo,cuda:nccl" if name == "cuda" else "gloo")
        run = run_sampling if given.get("stage") == "sample" else run_training
        run(given, device)
    except (Exception, KeyboardInterrupt) as e:
        if given.get("debug"):
            raise
        status = {WrongCommand: 2}.get(type(e), 1)
        line = f"{type(e).__name__}: {e} (--debug shows where)"
        if isinstance(e, UserError):
            line = str(e)
        elif isinstance(e, KeyboardInterrupt):
            line = f"interrupted: {e} the same command continues"
        elif "out of memory" in str(e) or "allocate memory" in str(e):
            line = "out of memory: more --micro-batches, --activation-checkpointing, fewer samples"
        if RANK == 0 or (status == 1 and isinstance(e, Exception)):  # once if common to all
            print("fmd:", *line.split(), file=sys.stderr)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if WORLD > 1:  # at once: a normal exit may wait for processes that have not failed
        sys.stdout.flush()
        os._exit(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
