"""Tests of fmd against closed forms, independent computations, and the command line as a user meets it.

python -m pytest -q test_fmd.py
"""

import argparse
import copy
import dataclasses
import hashlib
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import diffusers
import matplotlib
import nbformat
import numpy as np
import PIL.Image
import pytest
import sklearn.datasets
import torch
import torchvision
from nbclient import NotebookClient

import fmd

matplotlib.use("Agg")
torch.set_num_threads(1)  # small tensors: more threads cost more than they bring
TINY = [
    "--group-size",
    "2",
    "--hidden-size",
    "16",
    "--depth",
    "1",
    "--batch-size",
    "16",
    "--teacher-batch-size",
    "16",
    "--teacher-steps",
    "8",
    "--steps",
    "12",
    "--eval-samples",
    "200",
    "--solver-steps",
    "8",
    "--log-interval",
    "3",
    "--eval-interval",
    "6",
    "--checkpoint-interval",
    "4",
    "--warmup",
    "2",
    "--device",
    "cpu",
]


def images(*rows):
    """Numbers -> (B, C, 1, 1) in double precision."""
    return torch.tensor(rows, dtype=torch.float64)[:, :, None, None]


def column(v):
    return v[:, None, None, None]


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def times(n, seed=0, low=0.05, high=0.95):
    return low + (high - low) * torch.rand(
        n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def perturbed(network, seed=0, scale=0.3):
    """In double precision, with weights that are not zero anywhere: the initial ones hide most of the network."""
    generator = torch.Generator().manual_seed(seed)
    network = network.double()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(
                scale * torch.randn(p.shape, generator=generator, dtype=p.dtype) / max(1, p[0].numel()) ** 0.5
            )
    return network


def small(cls=fmd.DiT, seed=0, **settings):
    return perturbed(cls(**{**dict(num_classes=3, hidden_size=16, depth=2, num_heads=2), **settings}), seed)


# ----------------------------------------------------------------------------------------- the Gaussian, in closed form

MU, S = torch.tensor([0.7, -0.4], dtype=torch.float64), 0.6


def gaussian_flow(z, delta):
    scale = (delta**2 * S**2 + (1 - delta) ** 2).sqrt()
    return column(delta) * MU[:, None, None] + column(scale) * z


class GaussianMap(torch.nn.Module):
    """The exact student of N(MU, S^2), its samples shifted by `shift` times delta."""

    def __init__(self, shift=0.0):
        super().__init__()
        self.shift = torch.nn.Parameter(torch.full((2, 1, 1), shift, dtype=torch.float64))

    def forward(self, z, delta, y=None, guidance=None):
        root = (delta**2 * S**2 + (1 - delta) ** 2).sqrt()
        return MU[:, None, None] + self.shift + column(((1 + S**2) * delta - 2) / (1 + root)) * z

    def map(self, z, delta, y=None, guidance=None):
        return z + column(delta) * self(z, delta)


def gaussian_teacher(shift=0.0):
    teacher = fmd.ExactTeacher(MU[None] + shift, [S]).double()
    teacher.means, teacher.stds = MU[None] + shift, torch.tensor([S], dtype=torch.float64)
    return teacher


def slope(t):
    return ((1 - t) * S**2 - t) / ((1 - t) ** 2 * S**2 + t**2)


@pytest.mark.parametrize(
    "form, h, tolerance", [("jvp", 0.1, 1e-12), ("difference", 1e-4, 1e-6), ("step", 1e-3, 1e-5)]
)
def test_prediction_gradient_vanishes_at_the_exact_flow_map(form, h, tolerance):
    z, delta = noise(64, 2, 1, 1), times(64)
    D_G = fmd.prediction_gradient(GaussianMap(), gaussian_teacher(), z, delta, form=form, h=h)
    assert D_G.abs().max() < tolerance


@pytest.mark.parametrize(
    "form, h, tolerance", [("jvp", 0.1, 1e-12), ("difference", 1e-4, 1e-6), ("step", 1e-4, 1e-3)]
)
def test_prediction_gradient_of_a_shifted_map(form, h, tolerance):
    # f = phi + delta b, and u is linear in x: D_G = b - slope(1 - delta) delta b, of the sign of b where it matters
    z, delta, b = noise(64, 2, 1, 1), times(64), 0.3
    student = GaussianMap(b)
    D_G = fmd.prediction_gradient(student, gaussian_teacher(), z, delta, form=form, h=h)
    known = fmd.prediction_gradient(
        student, gaussian_teacher(), z, delta, form=form, h=h, F=student(z, delta)
    )
    assert torch.equal(D_G, known) and not known.requires_grad
    expected = column(b * (1 - slope(1 - delta) * delta)).expand_as(z)
    torch.testing.assert_close(D_G, expected, atol=tolerance, rtol=tolerance)
    assert (D_G[delta < 0.5] > 0).all()


def test_a_stretch_of_path_begins_where_the_average_says_and_takes_as_many_steps_as_asked():
    student, average, u = small(fmd.FlowMap), small(fmd.FlowMap, seed=1), small(seed=2)
    z, delta, h = noise(32, 2, 1, 1), times(32, low=0.5), times(32, low=0.1, seed=1) / 2
    with torch.no_grad():
        begin = z + column(delta - h) * average(z, delta - h)
        stretch = lambda x, s, y: column(h) * u(x, 1 - delta + s * h)  # noqa: E731  s falls from 1 to 0
        end = fmd.solve_ode(stretch, begin, 3, "rk4")
        expected = (z + column(delta) * student(z, delta) - end) / column(h)
    D_G = fmd.prediction_gradient(student, u, z, delta, form="step", h=h, ema=average, steps=3)
    torch.testing.assert_close(D_G, expected)
    own = fmd.prediction_gradient(student, u, z, delta, form="step", h=h, steps=3)
    itself = fmd.prediction_gradient(student, u, z, delta, form="step", h=h, ema=student, steps=3)
    assert torch.equal(own, itself) and (own - D_G).abs().max() > 1e-3


def test_solve_ode_follows_a_stretch_of_path():
    z, t, h = noise(32, 2, 1, 1), times(32, low=0.5), times(32, low=0.1, seed=1) / 2
    begin, end = gaussian_flow(z, 1 - t), gaussian_flow(z, 1 - t + h)
    path = fmd.solve_ode(gaussian_teacher(), begin, 20, "rk4", return_path=True, t=t, h=h)
    torch.testing.assert_close(path[-1], end, atol=1e-6, rtol=0)
    torch.testing.assert_close(path[10], gaussian_flow(z, 1 - t + h / 2), atol=1e-6, rtol=0)


class TwoTimeGaussianMap(GaussianMap):
    """The exact map of N(MU, S^2) from a state at any time to an earlier one."""

    def forward(self, x, delta, y=None, guidance=None, start_time=None):
        start = torch.ones_like(delta) if start_time is None else start_time
        here, there = (((1 - t) ** 2 * S**2 + t**2).sqrt() for t in (start, start - delta))
        offset = x - column(1 - start) * MU[:, None, None]
        # (there - here) / delta without the division by a small number
        ratio = ((1 - start + 1 - start + delta) * S**2 - (2 * start - delta)) / (there + here)
        return MU[:, None, None] + self.shift + column(ratio / here) * offset

    def map(self, x, delta, y=None, guidance=None, start_time=None):
        return x + column(delta) * self(x, delta, start_time=start_time)


@pytest.mark.parametrize(
    "form, h, tolerance", [("jvp", 0.1, 1e-12), ("difference", 1e-4, 1e-6), ("step", 1e-3, 1e-5)]
)
def test_meanflow_gradient_vanishes_at_the_exact_flow_map_wherever_the_states_are(form, h, tolerance):
    x, start, how = 3 * noise(64, 2, 1, 1) + 1, times(64, low=0.2), dict(form=form, h=h)
    delta = start * times(64, seed=1)
    student = TwoTimeGaussianMap()
    torch.testing.assert_close(student(x, delta), GaussianMap()(x, delta))  # from the prior
    D = fmd.meanflow_gradient(student, gaussian_teacher(), x, delta, start, **how)
    assert D.abs().max() < tolerance
    # F + b has the same derivatives as F, and u is asked at x whatever F says: D = b
    shifted = TwoTimeGaussianMap(0.3)
    D = fmd.meanflow_gradient(shifted, gaussian_teacher(), x, delta, start, **how)
    torch.testing.assert_close(D, torch.full_like(D, 0.3), atol=10 * tolerance, rtol=0)
    one = (v[:1].expand(64) for v in (delta, start))  # one time for all, in one number's memory
    D = fmd.meanflow_gradient(shifted, gaussian_teacher(), x, *one, **how)
    torch.testing.assert_close(D, torch.full_like(D, 0.3), atol=10 * tolerance, rtol=0)


def test_correction_gradient_is_zero_at_the_truth_and_points_away_from_it():
    x_r, r, b = noise(64, 2, 1, 1), times(64), 0.3
    u = gaussian_teacher()
    assert fmd.correction_gradient(u(x_r, r), u, x_r, r).abs().max() == 0
    D_N = fmd.correction_gradient(gaussian_teacher(b)(x_r, r), u, x_r, r)
    variance = (1 - r) ** 2 * S**2 + r**2
    torch.testing.assert_close(D_N, column(b * r / variance).expand_as(x_r))  # of b's sign: descent goes back


def test_correction_descends_the_kl_between_noised_laws():
    # KL(q_r || p_r) of two Gaussians with means (1 - r) b apart; method: its gradient is (1 - r)^2 / r times D_N
    r = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    b = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    variance = (1 - r) ** 2 * S**2 + r**2
    for i in range(3):
        (slope_of_kl,) = torch.autograd.grad(((1 - r[i]) * b) ** 2 / (2 * variance[i]), b)
        x = images([0.1, 0.2])
        D_N = fmd.correction_gradient(
            gaussian_teacher(0.3)(x, r[i : i + 1]), gaussian_teacher(), x, r[i : i + 1]
        )
        torch.testing.assert_close((1 - r[i]) ** 2 / r[i] * D_N.flatten()[0], slope_of_kl)


def test_training_by_prediction_or_correction_recovers_the_gaussian():
    # the shift of an otherwise exact student is the only parameter: both losses, by themselves, must bring it to 0
    config = fmd.Config(prediction="jvp", decay=0.0, alpha=1.0, label_dropout=1.0)
    for share in (0.0, 1.0):
        student, c = GaussianMap(0.5), dataclasses.replace(config, correction_share=share)

        class ExactCritic(torch.nn.Module):
            def forward(self, x, r, y=None, guidance=None):
                return gaussian_teacher(student.shift.detach().flatten())(x, r)

        distiller = fmd.Distiller(student, ExactCritic(), lambda x, t, y=None: gaussian_teacher()(x, t), c)
        optimizer = torch.optim.SGD([student.shift], lr=0.3)
        for step in range(60):
            batch = fmd.draw_prior((2, 1, 1), 0, c, step)
            loss, _ = distiller({k: v.double() if v.is_floating_point() else v for k, v in batch.items()})
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert student.shift.abs().max() < 0.02, share


@pytest.mark.parametrize("method, order", [("euler", 1), ("heun", 2), ("rk4", 4)])
def test_solver_has_its_order_of_convergence(method, order):
    z, one = noise(32, 2, 1, 1), torch.ones(32, dtype=torch.float64)
    errors = [
        (fmd.solve_ode(gaussian_teacher(), z, n, method) - gaussian_flow(z, one)).abs().max().item()
        for n in (32, 64)
    ]
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.25


def test_solver_counts_its_evaluations_and_returns_its_path():
    calls = []

    def u(x, t, y=None):
        calls.append((t.item(), y))
        return gaussian_teacher()(x, t)

    z = noise(4, 2, 1, 1)
    for method, number in fmd.EVALUATIONS.items():
        calls.clear()
        path = fmd.solve_ode(u, z, 5, method, y="label", return_path=True)
        assert len(calls) == 5 * number and {y for _, y in calls} == {"label"}
        assert calls[0][0] == 1 and min(t for t, _ in calls) == pytest.approx(
            0 if number > 1 else 0.2, abs=1e-12
        )
        assert path.shape == (6, 4, 2, 1, 1) and torch.equal(path[0], z)
        assert torch.equal(path[-1], fmd.solve_ode(u, z, 5, method))
    with pytest.raises(ValueError):
        fmd.solve_ode(u, z, 0)
    with pytest.raises(ValueError):
        fmd.solve_ode(u, z, 2, "midpoint")


# ------------------------------------------------------------------------------------------------- teachers


@pytest.mark.parametrize("label", [None, 0, 2, 3])
def test_exact_teacher_against_integrals_over_the_data(label):
    # one dimension: E[x - n | x_t] by summing over x on a grid, n = (x_t - (1 - t) x) / t being then known
    means, stds = torch.tensor([[-1.0], [0.5], [1.5]]), torch.tensor([0.3, 0.15, 0.4])
    x = torch.linspace(-6, 6, 40001, dtype=torch.float64)
    components = [
        torch.exp(-((x - m) ** 2) / (2 * s**2)) / s for m, s in zip(means[:, 0].double(), stds.double())
    ]
    density = components[label] if label in (0, 2) else sum(components)
    teacher = fmd.ExactTeacher(means, stds)
    for t in (0.05, 0.3, 0.7, 0.99):
        for x_t in (-1.2, 0.1, 2.0):
            n = (x_t - (1 - t) * x) / t
            posterior = density * torch.exp(-(n**2) / 2)
            expected = (posterior * (x - n)).sum() / posterior.sum()
            y = None if label is None else torch.tensor([label])
            found = teacher(torch.full((1, 1, 1, 1), x_t), torch.tensor([t]), y)
            torch.testing.assert_close(found.double().flatten()[0], expected, atol=3e-4, rtol=3e-4)


def test_exact_teacher_refuses_points():
    with pytest.raises(ValueError):
        fmd.ExactTeacher([[0.0, 0.0]], [0.0])
    with pytest.raises(ValueError):
        fmd.ExactTeacher([[0.0, 0.0]], [1.0, 1.0])


def test_exact_teacher_draws_what_it_describes():
    teacher = fmd.ExactTeacher([[1.0, 0.0, -2.0], [0.0, 3.0, 1.0]], [0.5, 0.1])
    x, y = teacher.draw(8000, torch.Generator().manual_seed(0), group=4)
    assert x.shape == (8000, *teacher.shape) == (8000, 3, 1, 1) and y.shape == (2000,)
    assert abs(y.float().mean() - 0.5) < 0.05
    for k in range(2):
        points = x[y.repeat_interleave(4) == k].flatten(1)
        torch.testing.assert_close(points.mean(0), teacher.means[k], atol=0.03, rtol=0)
        torch.testing.assert_close(points.std(0), teacher.stds[k].expand(3), atol=0, rtol=0.05)


def test_exact_teacher_generates_the_toy_it_describes():
    teacher = fmd.make_distiller(
        small(num_classes=8).float(), fmd.Config(toy="gaussians", exact_teacher=True)
    ).teacher
    z = noise(2000, 2, 1, 1).float()
    x = fmd.solve_ode(teacher, z, 64, "rk4")
    found = fmd.coverage(fmd.TOYS["gaussians"], x)
    assert found["outside"] < 0.005 and found["emptiest"] > 0.75
    y = torch.full((500,), 3)
    x = fmd.solve_ode(teacher, z[:500], 64, "rk4", y).flatten(1)
    angle = torch.tensor(3 * math.pi / 4)
    torch.testing.assert_close(x.mean(0), 1.4 * torch.stack([angle.cos(), angle.sin()]), atol=0.02, rtol=0)
    torch.testing.assert_close(x.std(0), torch.full((2,), 0.15), atol=0.01, rtol=0)


def test_guidance_is_linear_inside_its_interval_and_one_call():
    network, calls = small(), []

    class Counted(torch.nn.Module):
        num_classes = 3

        def forward(self, x, t, y=None):
            calls.append(len(x))
            return network(x, t, y)

    x, t, y = (
        noise(6, 2, 1, 1),
        torch.tensor([0.0, 0.2, 0.5, 0.7, 0.71, 1.0]).double(),
        torch.tensor([0, 1, 2, 0, 1, 3]),
    )
    gamma = torch.tensor([2.0, 3, 4, 5, 6, 7]).double()
    with torch.no_grad():
        found = fmd.guided(Counted(), gamma, (0.2, 0.7))(x, t, y)
        label, null = network(x, t, y), network(x, t)
    gamma = torch.tensor([1.0, 3, 4, 5, 1, 1]).double()
    torch.testing.assert_close(found, column(gamma) * label + column(1 - gamma) * null)
    assert calls == [12]
    torch.testing.assert_close(fmd.guided(Counted(), 4.0)(x, t), null)
    torch.testing.assert_close(fmd.guided(Counted(), 1.0)(x, t, y), label)


def test_flow_matching_is_the_mean_square_by_hand():
    class Constant(torch.nn.Module):
        def forward(self, x, t, y=None):
            self.seen = (x, t, y)
            return torch.full_like(x, 2.0)

    network = Constant()
    batch = dict(
        x=images([1.0, 3.0]), n=images([-1.0, 1.0]), t=torch.tensor([0.25]).double(), y=torch.tensor([1])
    )
    loss, figures = fmd.FlowMatching(network)(batch)
    torch.testing.assert_close(network.seen[0], images([0.5, 2.5]))  # a quarter of the way to the noise
    assert network.seen[1:] == (batch["t"], batch["y"])
    assert loss.item() == figures["flow_matching"].item() == 0  # x - n = 2, from noise to data


# ------------------------------------------------------------------------------------------------- network


def plain_dit(w, x, t, y, heads, depth, patch):
    """A DiT from its description, one sample at a time and in other words than fmd's."""
    D, side = w["pos_embed"].shape[2], x.shape[2] // patch
    frequency = torch.tensor([10000 ** (-i / 128) for i in range(128)], dtype=x.dtype)

    def linear(name, v):
        return v @ w[name + ".weight"].T + w[name + ".bias"]

    def norm(v, eps, scale=1.0, shift=0.0):
        v = v - v.mean(-1, keepdim=True)
        return v / (v.square().mean(-1, keepdim=True) + eps).sqrt() * scale + shift

    outputs = []
    for b in range(len(x)):
        embedding = torch.cat([torch.cos(t[b] * frequency), torch.sin(t[b] * frequency)])
        c = linear("t_embedder.mlp.2", torch.nn.functional.silu(linear("t_embedder.mlp.0", embedding)))
        c = torch.nn.functional.silu(c + w["y_embedder.embedding_table.weight"][y[b]])
        tokens = []
        for i in range(side):
            for j in range(side):
                block = x[b, :, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch]
                tokens.append(
                    (w["x_embedder.proj.weight"] * block).sum((1, 2, 3)) + w["x_embedder.proj.bias"]
                )
        h = torch.stack(tokens) + w["pos_embed"][0]
        for k in range(depth):
            p = f"blocks.{k}."
            a = linear(p + "adaLN_modulation.1", c).reshape(6, D)
            m = norm(h, 1e-6) * (1 + a[1]) + a[0]
            q, key, v = linear(p + "attn.qkv", m).reshape(len(h), 3, heads, D // heads).unbind(1)
            if p + "attn.q_norm.weight" in w:
                q = norm(q, 1e-5, w[p + "attn.q_norm.weight"], w[p + "attn.q_norm.bias"])
                key = norm(key, 1e-5, w[p + "attn.k_norm.weight"], w[p + "attn.k_norm.bias"])
            mixed = []
            for i in range(heads):
                weight = (q[:, i] @ key[:, i].T / (D // heads) ** 0.5).exp()
                mixed.append(weight / weight.sum(1, keepdim=True) @ v[:, i])
            h = h + a[2] * linear(p + "attn.proj", torch.cat(mixed, 1))
            m = linear(p + "mlp.fc1", norm(h, 1e-6) * (1 + a[4]) + a[3])
            m = 0.5 * m * (1 + torch.tanh((2 / math.pi) ** 0.5 * (m + 0.044715 * m**3)))
            h = h + a[5] * linear(p + "mlp.fc2", m)
        a = linear("final_layer.adaLN_modulation.1", c).reshape(2, D)
        h = linear("final_layer.linear", norm(h, 1e-6) * (1 + a[1]) + a[0])
        out = torch.empty(h.shape[1] // patch**2, side * patch, side * patch, dtype=x.dtype)
        for i in range(side):
            for j in range(side):
                piece = h[i * side + j].reshape(patch, patch, -1)
                out[:, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch] = piece.permute(2, 0, 1)
        outputs.append(out)
    return torch.stack(outputs)


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(input_size=4, in_channels=3, patch_size=2),
        dict(input_size=4, in_channels=3, patch_size=2, qk_norm=True),
    ],
)
def test_network_against_a_plain_implementation(settings):
    network = small(**settings)
    x, t, y = noise(3, *network.shape), times(3), torch.tensor([0, 3, 2])
    expected = plain_dit(network.state_dict(), x, t, y, 2, 2, network.patch_size)
    with torch.no_grad():
        torch.testing.assert_close(network(x, t, y), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(network(x, t, None), network(x, t, torch.full((3,), 3)))
        torch.testing.assert_close(network(x, t[:1], y), network(x, t[:1].expand(3), y))


def test_names_and_number_of_parameters_are_those_of_public_files():
    network = fmd.DiT(32, 4, 1000, 384, 12, 6, 2)  # S/2
    D, names = 384, set(network.state_dict())
    block = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"]
    layers = [f"blocks.{i}.{b}" for i in range(12) for b in block] + [
        "x_embedder.proj",
        "t_embedder.mlp.0",
        "t_embedder.mlp.2",
        "final_layer.linear",
        "final_layer.adaLN_modulation.1",
    ]
    expected = {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    assert names == expected | {"pos_embed", "y_embedder.embedding_table.weight"}
    per_block = (
        (3 * D * D + 3 * D) + (D * D + D) + (4 * D * D + 4 * D) + (4 * D * D + D) + (6 * D * D + 6 * D)
    )
    others = (16 * D + D) + (256 * D + D) + (D * D + D) + 1001 * D + (2 * D * D + 2 * D) + (16 * D + 16)
    assert sum(p.numel() for p in network.parameters()) == 12 * per_block + others
    assert network.pos_embed.shape == (1, 256, D)
    assert set(fmd.DiT(qk_norm=True).state_dict()) - set(fmd.DiT().state_dict()) == {
        f"blocks.{i}.attn.{q}_norm.{part}" for i in range(3) for q in "qk" for part in ("weight", "bias")
    }


def test_position_embedding_by_its_formula():
    table = fmd.position_embedding(16, 5)[0]
    row, column = 3, 2
    token = table[row * 5 + column].double()
    frequency = torch.tensor([10000 ** (-i / 4) for i in range(4)], dtype=torch.float64)
    expected = [
        torch.sin(column * frequency),
        torch.cos(column * frequency),
        torch.sin(row * frequency),
        torch.cos(row * frequency),
    ]
    torch.testing.assert_close(token, torch.cat(expected), atol=1e-6, rtol=0)


def test_network_begins_at_zero_and_blocks_as_the_identity():
    network = fmd.DiT(input_size=4, in_channels=3, patch_size=2)
    assert network(torch.randn(2, 3, 4, 4), torch.rand(2)).abs().max() == 0
    x = torch.randn(2, 4, 64)
    assert torch.equal(network.blocks[0](x, torch.randn(2, 64), 4), x)


def test_student_made_from_a_teacher_is_its_velocity():
    teacher = small()
    student = fmd.FlowMap.from_teacher(teacher).double()
    student.load_state_dict(teacher.state_dict())
    z, delta, y = noise(5, 2, 1, 1), times(5), torch.tensor([0, 1, 2, 3, 1])
    with torch.no_grad():
        torch.testing.assert_close(student(z, delta, y), teacher(z, 1 - delta, y))
        torch.testing.assert_close(student.map(z, delta, y), z + column(delta) * teacher(z, 1 - delta, y))
        assert torch.equal(student.map(z, torch.zeros(5).double(), y), z)
    copy = fmd.FlowMap.from_teacher(teacher)
    assert all(
        torch.equal(a, b) for a, b in zip(copy.state_dict().values(), teacher.float().state_dict().values())
    )


def test_guidance_input_changes_nothing_at_first_and_something_later():
    teacher = small().float()
    student = fmd.FlowMap.from_teacher(teacher, guidance=True)
    z, delta, y, strength = (
        torch.randn(4, 2, 1, 1),
        torch.rand(4),
        torch.tensor([0, 1, 2, 3]),
        torch.tensor([1.0, 2, 3, 4]),
    )
    torch.testing.assert_close(student(z, delta, y, strength), teacher(z, 1 - delta, y))
    perturbed(student, 1)
    z, delta, strength = z.double(), delta.double(), strength.double()
    assert (student(z, delta, y, strength) - student(z, delta, y, strength + 1)).abs().min() > 1e-6
    torch.testing.assert_close(student(z, delta, y, None), student(z, delta, y, torch.ones(4).double()))
    with pytest.raises(ValueError):
        teacher.double()(z, delta, y, strength)


def test_a_student_may_begin_at_any_time():
    teacher = small().float()
    student = fmd.FlowMap.from_teacher(teacher, start_time=True)
    x, delta, y, start = (
        torch.randn(4, 2, 1, 1),
        0.3 * torch.rand(4),
        torch.arange(4),
        0.5 + 0.5 * torch.rand(4),
    )
    torch.testing.assert_close(student(x, delta, y, None, start), teacher(x, start - delta, y))
    torch.testing.assert_close(student(x, delta, y), teacher(x, 1 - delta, y))
    perturbed(student, 1)
    x, delta, start = x.double(), delta.double(), start.double()
    same_end = student(x, delta + 0.1, y, None, start + 0.1)  # the end of the path alone does not tell
    assert (student(x, delta, y, None, start) - same_end).abs().min() > 1e-6
    torch.testing.assert_close(student(x, delta, y), student(x, delta, y, None, torch.ones(4).double()))
    mapped = student.map(x, delta, y, None, start)
    torch.testing.assert_close(mapped, x + column(delta) * student(x, delta, y, None, start))
    with pytest.raises(ValueError):
        fmd.FlowMap.from_teacher(teacher)(x.float(), delta.float(), y, None, start.float())


# ------------------------------------------------------------------------------------------------- distillation


def test_forms_of_the_prediction_converge_to_each_other():
    student, teacher = (
        small(fmd.FlowMap, 1, input_size=4, patch_size=2),
        small(seed=2, input_size=4, patch_size=2),
    )
    z, delta, y = noise(6, 2, 4, 4), times(6, low=0.3, high=0.7), torch.tensor([0, 1, 2, 3, 0, 1])
    exact = fmd.prediction_gradient(student, teacher, z, delta, y, form="jvp")
    # the derivative, independently: reverse mode of each output
    d = delta.clone().requires_grad_(True)
    out = student(z, d, y)
    rows = [torch.autograd.grad(out.flatten(1)[:, i].sum(), d, retain_graph=True)[0] for i in range(32)]
    v_G = out + column(delta) * torch.stack(rows, 1).view_as(out)
    torch.testing.assert_close(exact, (v_G - teacher(student.map(z, delta, y), 1 - delta, y)).detach())
    one = delta[:1].expand(6)  # one time for all, in one number's memory
    for form in ("jvp", "difference", "step"):
        same, each = (
            fmd.prediction_gradient(student, teacher, z, d, y, form=form) for d in (one, one.clone())
        )
        torch.testing.assert_close(same, each)
    for form, order in (("difference", 2), ("step", 1)):
        gaps = [
            (fmd.prediction_gradient(student, teacher, z, delta, y, form=form, h=h) - exact)
            .abs()
            .max()
            .item()
            for h in (0.02, 0.01)
        ]
        assert abs(math.log2(gaps[0] / gaps[1]) - order) < 0.2, form


def test_a_step_as_long_as_the_path_is_regression_on_the_teacher():
    # h = delta: the step begins at the noise, so the student is held to the teacher's own RK4 step
    student, teacher = small(fmd.FlowMap, 1), small(seed=2)
    z, delta = noise(6, 2, 1, 1), times(6)
    D_G = fmd.prediction_gradient(student, teacher, z, delta, form="step", h=delta)
    k1 = teacher(z, torch.ones(6).double())
    k2 = teacher(z + column(delta) / 2 * k1, 1 - delta / 2)
    k3 = teacher(z + column(delta) / 2 * k2, 1 - delta / 2)
    k4 = teacher(z + column(delta) * k3, 1 - delta)
    torch.testing.assert_close(D_G, (student(z, delta) - (k1 + 2 * k2 + 2 * k3 + k4) / 6).detach())


def gradients(loss, network):
    return torch.autograd.grad(loss, list(network.parameters()), retain_graph=True, allow_unused=True)


def assert_same_gradients(found, expected):
    """allow_unused: a weight that takes no part (queries and keys of a lone token) has gradient None or 0."""
    for a, b in zip(found, expected):
        torch.testing.assert_close(torch.zeros(1) if a is None else a, torch.zeros(1) if b is None else b)


@pytest.mark.parametrize("form", ["jvp", "difference", "step"])
def test_gradient_of_the_prediction_is_that_of_its_equation(form):
    # [8]: half the mean square of F - sg(u - delta dF/ddelta), all of the target held fixed
    config = fmd.Config(prediction=form, decay=0.0, correction_share=0.0)
    student, teacher = small(fmd.FlowMap, 1), small(seed=2)
    z, delta, y, h = (
        noise(6, 2, 1, 1),
        times(6),
        torch.tensor([0, 1, 2, 3, 0, 1]),
        torch.full((6,), 0.04).double(),
    )
    distiller = fmd.Distiller(student, None, teacher, config)
    loss, _ = distiller(dict(z=z, delta=delta, h=h, y=y, r=delta[:0], n=z[:0]))
    F = student(z, delta, y)
    with torch.no_grad():
        at = delta.clone()
        if form == "step":
            begin = z + column(at - h) * student(z, at - h, y)
            k1 = teacher(begin, 1 - at + h, y)
            k2 = teacher(begin + column(h) / 2 * k1, 1 - at + h / 2, y)
            k3 = teacher(begin + column(h) / 2 * k2, 1 - at + h / 2, y)
            k4 = teacher(begin + column(h) * k3, 1 - at, y)
            target = (begin + column(h) * (k1 + 2 * k2 + 2 * k3 + k4) / 6 - z) / column(at)
        else:
            e = 0.04 if form == "difference" else 1e-5
            dF = (student(z, at + e, y) - student(z, at - e, y)) / (2 * e)
            target = teacher(z + column(at) * F, 1 - at, y) - column(at) * dF
    expected = (F - target).square().mean() / 2
    for a, b in zip(gradients(loss, student), gradients(expected, student)):
        if a is not None or b is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    assert all(p.grad is None for p in teacher.parameters())


def test_gradient_of_the_correction_is_that_of_its_equation():
    config = fmd.Config(alpha=0.7, correction_share=0.5, decay=0.0)
    student, critic, teacher = small(fmd.FlowMap, 1), small(seed=3), small(seed=2)
    distiller = fmd.Distiller(student, critic, teacher, config).double()
    distiller.norm_G.fill_(2.0)
    distiller.norm_N.fill_(5.0)
    z, r, n, y = noise(6, 2, 1, 1), times(6), noise(6, 2, 1, 1, seed=5), torch.tensor([0, 1, 2, 3, 0, 1])
    delta, h = times(6, seed=8), torch.full((6,), 0.01).double()
    z_p, one = noise(6, 2, 1, 1, seed=9), torch.ones(6).double()
    loss, figures = distiller(
        dict(z=torch.cat([z_p, z]), delta=torch.cat([delta, one]), y=torch.cat([y, y]), h=h, r=r, n=n)
    )
    balance = 0.7 * 2 / (5 + config.eps)
    assert figures["lambda"].item() == pytest.approx(balance)

    F = student(z, one, y)
    x = (z + F).detach()
    x_r = (1 - r)[:, None, None, None] * x + r[:, None, None, None] * n
    D_N = (critic(x_r, r, y) - teacher(x_r, r, y)).detach()
    prediction = distiller.predict(student(z_p, delta, y), z_p, delta, y, None, h)[0]
    assert_same_gradients(
        gradients(loss, student), gradients(prediction + balance * (F * D_N).mean(), student)
    )
    critic_loss = (critic(x_r, r, y) - (x - n)).square().mean()
    assert_same_gradients(gradients(loss, critic), gradients(critic_loss, critic))
    # figures, and the norms that the next step balances with
    rms = D_N.flatten(1).square().mean(1)
    assert figures["correction"].item() == pytest.approx(rms.mean().item())
    assert figures["critic"].item() == pytest.approx(critic_loss.item())
    assert figures["norm_N"].item() == pytest.approx(rms.sqrt().mean().item())


@pytest.mark.parametrize("tokens", [1, 4])
def test_a_group_shares_its_conditioning(tokens):
    side = int(tokens**0.5)
    x, t, y, gamma = noise(12, 2, side, side), times(4), torch.tensor([0, 1, 2, 3]), times(4, seed=1)
    each = [v.repeat_interleave(3) for v in (t, y, gamma)]
    network = small(input_size=side)
    torch.testing.assert_close(network(x, t, y), network(x, *each[:2]))
    torch.testing.assert_close(
        fmd.guided(network, gamma)(x, t, y), fmd.guided(network, each[2])(x, *each[:2])
    )
    torch.testing.assert_close(
        fmd.ode_step(network, x, t, t / 2, "rk4", y),
        fmd.ode_step(network, x, each[0], each[0] / 2, "rk4", each[1]),
    )
    student = small(fmd.FlowMap, input_size=side, guidance=True)
    torch.testing.assert_close(student.map(x, t, y, gamma), student.map(x, *each))
    torch.testing.assert_close(fmd.noised(x, 2 * x, t), fmd.noised(x, 2 * x, each[0]))
    if tokens == 1:
        exact = fmd.ExactTeacher(torch.randn(3, 2), torch.ones(3)).double()
        torch.testing.assert_close(exact(x, t, y), exact(x, *each[:2]))


@pytest.mark.parametrize("group_size", [1, 4])
def test_losses_in_groups_equal_those_of_single_samples(group_size):
    # the same batch, said in groups and said sample by sample
    config = fmd.Config(batch_size=16, group_size=group_size, guidance_max=3.0, alpha=0.7)
    batch = fmd.draw_prior((2, 1, 1), 3, config, 5)
    assert len(batch["delta"]) == 16 // group_size and len(batch["z"]) == 16 and len(batch["n"]) == 4
    single = {k: v if k in "zn" else v.repeat_interleave(group_size) for k, v in batch.items()}
    found, networks = [], (small(fmd.FlowMap, 1, guidance=True), small(seed=2, guidance=True), small(seed=3))
    for data in (batch, single):
        distiller = fmd.Distiller(*networks, config)
        distiller.norm_G.fill_(1.0)
        distiller.norm_N.fill_(1.0)
        loss, figures = distiller({k: v.double() if v.is_floating_point() else v for k, v in data.items()})
        found.append([loss, *figures.values(), *gradients(loss, distiller.network)])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b)


def test_regression_pairs_and_their_loss():
    config = fmd.Config(
        method="regression",
        batch_size=16,
        group_size=4,
        steps=3,
        decay=0.0,
        guidance_max=3.0,
        label_dropout=0.3,
        eval_batch_size=8,  # pairs are solved in several calls
    )
    start = small().float()
    rival = fmd.make_distiller(start, config)
    # the evaluations of the distillation, (12 x 4 + 4) x 2 x 3, buy this many pairs of 8 RK4 steps, in whole groups
    assert len(rival.z) == 4 * ((52 * 2 * 3) // (32 * 2) // 4) and len(rival.y) == len(rival.z) // 4
    config = dataclasses.replace(config, steps=30)
    rival = fmd.make_distiller(start, config)
    y, gamma = (v.repeat_interleave(4) for v in (rival.y, rival.guidance))
    phi = fmd.solve_ode(fmd.guided(start, gamma), rival.z, 40, "heun", y)
    torch.testing.assert_close(rival.phi, phi, rtol=0.02, atol=0.02)
    groups = rival.draw(3)["groups"]
    assert torch.equal(groups, rival.draw(3)["groups"]) and not torch.equal(groups, rival.draw(4)["groups"])
    assert len(groups) == 4 and groups.max() < len(rival.y)
    loss, figures = rival({"groups": groups})
    rows = torch.cat([torch.arange(4 * g, 4 * g + 4) for g in groups.tolist()])
    error = rival.network.map(rival.z[rows], torch.ones(16), y[rows], gamma[rows]) - rival.phi[rows]
    for a, b in zip(gradients(loss, rival.network), gradients(error.square().mean() / 2, rival.network)):
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    assert figures["prediction"].item() == pytest.approx(error.square().mean().item(), rel=1e-4)


@pytest.mark.parametrize("form, steps", [("jvp", 1), ("difference", 1), ("step", 1), ("step", 2)])
def test_meanflow_by_its_equation(form, steps):
    # half the mean square of F - sg(u - delta dF), dF along the teacher's path through (x, start), the end held
    config = fmd.Config(
        method="meanflow", prediction=form, decay=0.0, batch_size=6, guidance_max=3.0, step_count=steps
    )
    start = small().float()
    data = fmd.ExactTeacher([[2.0, 0.0], [0.0, 2.0], [1.0, 1.0]], [0.1, 0.2, 0.3])
    rival = fmd.make_distiller(start, config, data)
    perturbed(rival.network, 5)
    average = rival.network
    if steps > 1:  # as ema_target would have it
        average = rival.ema = perturbed(copy.deepcopy(rival.network), 6)
    rival.teacher.double()
    batch = rival.draw(3)
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    loss, figures = rival(batch)
    student, y, gamma, t, delta, h = (
        rival.network,
        *(batch[k] for k in ("y", "guidance", "start_time", "delta", "h")),
    )
    x = column(1 - t) * batch["x"] + column(t) * batch["z"]
    u = fmd.guided(start, gamma)
    F = student(x, delta, y, gamma, t)
    with torch.no_grad():
        v = u(x, t, y)
        if form == "step":
            later = fmd.solve_ode(lambda x, s, y: column(h) * u(x, t - (1 - s) * h, y), x, steps, "rk4", y)
            rest = later + column(delta - h) * average(later, delta - h, y, gamma, t - h)
            target = (rest - x) / column(delta)
        else:
            e = h if form == "difference" else torch.full_like(h, 1e-5)
            ahead = student(x - column(e) * v, delta + e, y, gamma, t + e)
            behind = student(x + column(e) * v, delta - e, y, gamma, t - e)
            target = v - column(delta) * (ahead - behind) / column(2 * e)
    expected = (F - target).square().mean() / 2
    for a, b in zip(gradients(loss, student), gradients(expected, student)):
        if a is not None or b is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    D = (F - target) * (column(delta / h) if form == "step" else 1)
    assert figures["prediction"].item() == pytest.approx(D.square().mean().item(), rel=1e-4)
    assert all(p.grad is None for p in start.parameters())


def test_meanflow_draws_data_and_times():
    settings = dict(method="meanflow", batch_size=4000, group_size=4, label_dropout=0.25, delta_power=1.5)
    config = fmd.Config(**settings)
    data = fmd.ToyData("gaussians")
    rival = fmd.make_distiller(small(num_classes=8).float(), config, data)
    batch, same, other = rival.draw(7), rival.draw(7), rival.draw(8)
    assert all(torch.equal(batch[k], same[k]) and not torch.equal(batch[k], other[k]) for k in batch)
    y = batch["y"].repeat_interleave(4)
    assert abs((y == 8).float().mean() - 0.25) < 0.05
    angle = y[y < 8] * math.pi / 4
    center = 1.4 * torch.stack([angle.cos(), angle.sin()], 1)
    distance = (batch["x"].flatten(1)[y < 8] - center).norm(dim=1)
    assert distance.max() < 0.15 * 5.5  # labels are those of the data
    start, delta, h = batch["start_time"], batch["delta"], batch["h"]
    end = start - delta
    assert end.min() > -1e-6 and start.max() <= 1.001 and (0 < h).all() and (h <= delta).all()
    assert h.max() <= config.step_size
    assert abs(end.mean() - 1 / 2.5) < 0.01  # of U^1.5
    assert abs(((start - end) / (1 - end)).mean() - 0.5) < 0.03
    assert fmd.evaluations_per_step(config) == 4000 * 4
    assert fmd.evaluations_per_step(dataclasses.replace(config, prediction="jvp")) == 4000


def test_meanflow_learns_what_its_data_shows():
    # data where the teacher goes against data that lies elsewhere, the paper's mismatch
    config = fmd.Config(
        method="meanflow",
        prediction="step",
        batch_size=256,
        group_size=8,
        steps=200,
        learning_rate=8e-3,
        optimizer="muon",
        warmup=10,
        ema_decay=0.95,
        label_dropout=1.0,
    )
    u = fmd.ExactTeacher([[-1.0, 0.0], [1.0, 0.0]], [0.3, 0.3])
    z = noise(500, 2, 1, 1).float()
    phi, errors = fmd.solve_ode(u, z, 32, "rk4"), []
    for shift in (0.0, 5.0):
        torch.manual_seed(0)
        student = fmd.FlowMap.from_teacher(fmd.DiT(num_classes=2, hidden_size=32, depth=2), start_time=True)
        rival = fmd.MeanFlow(student, u, u, config)

        def draw(step):
            batch = rival.draw(step)
            return {**batch, "x": batch["x"] + shift}

        for _, _, state in fmd.train(rival, draw, config):
            pass
        errors.append(fmd.relative_error(fmd.jump(state.ema, z), phi))
    assert errors[0] < 0.3 and errors[1] > 1.6 * errors[0], errors


def test_decay_and_balance_by_hand(monkeypatch):
    # ||D_G||^2 / d = (1 + 4 + 4 + 16) / 4 = 6.25
    D, F = (
        torch.tensor([1.0, 2.0, -2.0, 4.0]).view(1, 4, 1, 1),
        torch.tensor([1.0, 1.0, 1.0, 1.0]).view(1, 4, 1, 1),
    )
    monkeypatch.setattr(fmd, "prediction_gradient", lambda *a, **k: D)
    for k, scale in ((0.0, 1.0), (0.5, 1 / 2.7), (1.0, 1 / 7.29)):  # 6.25 + 1.04 = 2.7^2
        distiller = fmd.Distiller(None, None, None, fmd.Config(prediction="jvp", decay=k, eps=1.04))
        term, norm, residual = distiller.predict(F, None, None, None, None, None)
        assert term.item() == pytest.approx(5 / 4 * scale)
        assert norm.item() == 2.5 and residual.item() == 6.25  # before the decay
    # the form 'step' weighs with h / delta = 0.2 before the decay
    at, h = torch.tensor([0.5]), torch.tensor([0.1])
    for k, expected in ((0.0, 5 / 4 * 0.2), (0.5, 5 / 4 / 2.5)):
        distiller = fmd.Distiller(None, None, None, fmd.Config(prediction="step", decay=k, eps=1e-12))
        term, norm, residual = distiller.predict(F, None, at, None, None, h)
        assert term.item() == pytest.approx(expected)
        assert norm.item() == 2.5 and residual.item() == 6.25


def test_guided_distillation_asks_the_guided_teacher_and_conditions_both_networks():
    config = fmd.Config(
        batch_size=16,
        guidance_min=1.0,
        guidance_max=4.0,
        correction_share=0.5,
        prediction="difference",
        decay=0.0,
        label_dropout=0.0,
    )
    start = small().float()
    distiller = fmd.make_distiller(start, config)
    batch = fmd.draw_prior(start.shape, start.num_classes, config, 0)
    assert ((1 <= batch["guidance"]) & (batch["guidance"] <= 4)).all() and batch["guidance"].std() > 0.3
    loss, figures = distiller(batch)
    loss.backward()
    for network in (distiller.network, distiller.critic):
        assert network.guidance_embedder.mlp[2].weight.grad.abs().max() > 0
    # by hand: D_G of the guided velocity
    p = {k: v[:8].double() for k, v in batch.items() if k != "y"}
    y, at = batch["y"][:8], p["delta"]
    student, teacher = distiller.network.double(), start.double()
    with torch.no_grad():
        F = student(p["z"], at, y, p["guidance"])
        low, high = (at - 0.005).clamp(min=0), (at + 0.005).clamp(max=1)
        dF = (student(p["z"], high, y, p["guidance"]) - student(p["z"], low, y, p["guidance"])) / column(
            high - low
        )
        f, g = p["z"] + column(at) * F, column(p["guidance"])
        u = g * teacher(f, 1 - at, y) + (1 - g) * teacher(f, 1 - at)
        expected = (F + column(at) * dF - u).flatten(1).square().mean()
    assert figures["prediction"].item() == pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.parametrize(
    "settings",
    [
        dict(prediction="step"),
        dict(prediction="step", step_count=3),
        dict(prediction="jvp", step_count=3),
        dict(prediction="difference"),
        dict(correction_share=0.0),
        dict(correction_share=1.0),
        dict(guidance_max=3.0),
    ],
)
def test_count_of_teacher_evaluations(settings):
    config, count = fmd.Config(batch_size=16, **settings), []
    start = small().float()
    distiller = fmd.make_distiller(start, config)
    forward = start.forward
    distiller.teacher.forward = lambda x, t, y=None: (count.append(len(x)), forward(x, t, y))[1]
    distiller(fmd.draw_prior(start.shape, 3, config, 0))
    assert sum(count) == fmd.evaluations_per_step(config)


def test_draws_are_pure_and_as_described():
    config = fmd.Config(batch_size=4000, teacher_batch_size=4000, seed=3, label_dropout=0.25)
    batch, again = (fmd.draw_prior((2, 1, 1), 5, config, 7) for _ in range(2))
    assert all(torch.equal(batch[k], again[k]) for k in batch)
    assert not torch.equal(batch["z"], fmd.draw_prior((2, 1, 1), 5, config, 8)["z"])
    assert (
        len(batch["h"]) == 3000 and len(batch["r"]) == 1000 and (batch["delta"][3000:] == 1).all()
    )  # 75 % and 25 %
    assert abs((batch["y"] == 5).float().mean().item() - 0.25) < 0.03
    assert set(batch["y"].tolist()) == set(range(6))
    assert abs(batch["z"].mean()) < 0.05 and abs(batch["z"].std() - 1) < 0.05
    delta, h = batch["delta"][:3000], batch["h"]
    assert (
        0 < delta.min()
        and delta.max() <= 1
        and abs(delta.mean() - 0.5) < 0.02
        and abs(delta.var() - 1 / 12) < 0.005
    )
    assert (delta * 3000).ceil().unique().numel() > 2990  # one in each of even parts
    assert (0 < h).all() and (h <= delta).all() and 0.24 < h.max() <= config.step_size
    assert h[delta > 0.25].min() >= config.step_size / 2
    crowded = fmd.draw_prior((2, 1, 1), 5, dataclasses.replace(config, delta_power=1.5), 7)["delta"][:3000]
    assert crowded.mean().item() == pytest.approx(0.6, abs=0.005)  # 1 - E[U^1.5]
    ends = dataclasses.replace(config, end_share=0.4)
    share = fmd.draw_prior((2, 1, 1), 5, ends, 7)["delta"][:3000]
    derivative = fmd.draw_prior((2, 1, 1), 5, dataclasses.replace(ends, prediction="jvp"), 7)["delta"]
    assert torch.equal(derivative, batch["delta"])
    rest = share[share < 1]
    assert (
        len(rest) == 1800 and abs(rest.mean() - 0.5) < 0.02 and (rest * 1800).ceil().unique().numel() > 1790
    )
    logit = torch.logit(batch["r"])
    assert abs(logit.mean() - 0.8) < 0.1 and abs(logit.std() - 1) < 0.08
    assert abs((batch["n"] * batch["z"][3000:]).mean()) < 0.06  # independent noises
    data = fmd.draw_data(fmd.ToyData("moons"), config, 7)
    assert abs(torch.logit(data["t"]).mean()) < 0.06 and set(data["y"].tolist()) == {0, 1, 2}


def test_draws_differ_between_seeds_and_streams():
    batches = [fmd.draw_prior((2, 1, 1), 5, fmd.Config(seed=s), 0)["z"] for s in (0, 1)]
    batches.append(fmd.draw_data(fmd.ToyData("moons"), fmd.Config(seed=0), 0)["n"])
    assert len({round(b.sum().item(), 4) for b in batches}) == 3


# ------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("method", ["prior", "meanflow"])
def test_targets_begin_at_the_average_if_asked_for(method):
    for asked in True, False:
        config = fmd.Config(method=method, batch_size=16, ema_target=asked)
        module = fmd.make_distiller(small().float(), config, fmd.ExactTeacher([[1.0, 0.0]] * 3, [0.2] * 3))
        state = fmd.TrainState(module, config)
        before = module(module.draw(0))[1]["prediction"]
        perturbed(state.ema, 3).float()
        assert (module(module.draw(0))[1]["prediction"] != before) == asked


class Quadratic(torch.nn.Module):
    """A loss with one weight, whose path can be followed by hand."""

    def __init__(self, curvature=1.0):
        super().__init__()
        self.network = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.ones_(self.network.weight)
        self.curvature = curvature

    def forward(self, batch):
        loss = self.curvature * self.network(batch["x"]).square().mean()
        return loss, {"loss": loss.detach()}


def test_average_of_the_weights_by_hand():
    config = fmd.Config(steps=5, learning_rate=0.1, ema_decay=0.3, warmup=0)
    weights, average = [], 1.0
    for step, _, state in fmd.train(Quadratic(), lambda step: dict(x=torch.ones(1, 1)), config):
        weights.append(state.networks["model"].weight.item())
        decay = min(0.3, step / (step + 9))
        average = decay * average + (1 - decay) * weights[-1]
        assert state.ema.weight.item() == pytest.approx(average, rel=1e-5)
    assert len(weights) == 5 and weights == sorted(weights, reverse=True)


def test_which_weights_have_which_optimizer_and_rate():
    config = fmd.Config(optimizer="muon", learning_rate=0.1, critic_learning_rate=0.3, warmup=0, steps=10)
    module = fmd.make_distiller(small().float(), config)
    state = fmd.TrainState(module, config)
    state.step = 5
    state.set_learning_rates()
    rates = {}
    for name, optimizer in state.optimizers.items():
        for group in optimizer.param_groups:
            for p in group["params"]:
                assert p not in rates
                rates[p] = name, group["lr"]
    names = {p: name for name, p in module.named_parameters() if not name.startswith("teacher.")}
    assert rates.keys() == names.keys()
    for p, name in names.items():
        matrix = name.startswith("network.") and re.search(r"blocks.*\.fc[12]\.weight", name)
        rate = 0.15 if name.startswith("critic.") else 0.05
        assert rates[p] == ("muon" if matrix else "adamw", pytest.approx(rate)), name
    plain = fmd.TrainState(module, dataclasses.replace(config, optimizer="adamw"))
    assert plain.optimizers.keys() == {"adamw"}


def test_no_graph_of_the_steps_before_is_kept():
    # an average that autograd follows would hold on to every step, for days
    for _, _, state in fmd.train(Quadratic(), lambda step: dict(x=torch.ones(1, 1)), fmd.Config(steps=3)):
        assert state.ema.weight.grad_fn is None and not state.ema.weight.requires_grad


def test_learning_rate_rises_and_falls():
    config = fmd.Config(steps=10, learning_rate=2.0, warmup=4)
    state = fmd.TrainState(Quadratic(), config)
    rates = []
    for state.step in range(10):
        state.set_learning_rates()
        rates.append(state.optimizers["adamw"].param_groups[0]["lr"])
    expected = [2 * min(1, (i + 1) / 4) * (1 - i / 10) for i in range(10)]
    assert rates == pytest.approx(expected)


def test_gradients_are_clipped_network_by_network():
    config = fmd.Config(steps=1, learning_rate=1e-3, clip=0.5, warmup=0)
    module = Quadratic(1e6)
    module.critic = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(module.critic.weight)
    quadratic = module.forward
    module.forward = lambda batch: (quadratic(batch)[0] + 0.1 * module.critic.weight.sum(), {})
    next(fmd.train(module, lambda step: dict(x=torch.ones(1, 1)), config))
    assert module.network.weight.grad.item() == pytest.approx(0.5, rel=1e-3)
    assert module.critic.weight.grad.item() == pytest.approx(0.1)  # untouched by the other's size


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_training_stops_before_a_number_that_is_not_finite_reaches_the_weights(bad):
    module = Quadratic()
    x = [1.0, 1.0, bad, 1.0]
    weights = []
    for step, figures, state in fmd.train(
        module, lambda step: dict(x=torch.full((1, 1), x[step])), fmd.Config(steps=4)
    ):
        weights.append(module.network.weight.item())
        assert bool(figures) == (step != 3) and state.ema.weight.isfinite().all()
    assert weights[1] == weights[2] and len(set(weights)) == 3  # the bad step is left out, the next is not
    seen, x = 0, [1.0, bad] + [bad] * 8 + [1.0] + [bad] * 10
    with pytest.raises(fmd.UserError, match="step 21.*not finite.*tenth.*lower learning rate"):
        for seen, _, _ in fmd.train(
            module, lambda step: dict(x=torch.full((1, 1), x[step])), fmd.Config(steps=30)
        ):
            pass
    assert seen == 20 and module.network.weight.isfinite().all()


# ------------------------------------------------------------------------------------------------- data and measures


@pytest.mark.parametrize("toy", fmd.TOYS)
def test_toys(toy):
    data = fmd.ToyData(toy)
    x, y = data.draw(20000, fmd.generator(1))
    assert x.shape == (20000, 2, 1, 1) and y.dtype == torch.int64
    assert 0.8 < x.std() < 1.25
    shares = y.bincount() / len(y)
    assert len(shares) == data.num_classes == fmd.TOYS[toy].num_classes
    torch.testing.assert_close(shares, torch.full_like(shares, 1 / len(shares)), atol=0.01, rtol=0)
    found = fmd.coverage(data.toy, x)
    assert found["outside"] < 0.002 and 0.85 < found["emptiest"] <= 1
    # points thrown into the toy's square are mostly outside, and a toy without a label has an empty part
    square = 4 * torch.rand(4000, 2, 1, 1, generator=fmd.generator(2)) - 2
    assert fmd.coverage(data.toy, square)["outside"] > 0.3
    assert fmd.coverage(data.toy, x[y != 0])["emptiest"] < 0.15


def test_checkerboard_is_a_checkerboard():
    x, y = fmd.ToyData("checkerboard").draw(5000, fmd.generator(1))
    cell = (x.flatten(1) + 2).floor().long()
    assert cell.min() == 0 and cell.max() == 3 and set((cell.sum(1) % 2).tolist()) == {0}
    assert (
        len({(label, *c) for label, c in zip(y.tolist(), map(tuple, cell.tolist()))}) == 8
    )  # a label, a cell


def test_a_toy_of_ones_own(tmp_path, capsys):
    points = np.random.default_rng(0).normal(size=(50, 2))
    np.save(tmp_path / "p.npy", points)
    data = fmd.ToyData(str(tmp_path / "p.npy"))
    x, y = data.draw(100, fmd.generator(0))
    assert data.num_classes == 0 and (y == 0).all() and x.shape == (100, 2, 1, 1)
    rows = {tuple(row) for row in points.astype(np.float32).tolist()}
    assert {tuple(row) for row in x.flatten(1).numpy().tolist()} <= rows
    for name, bad in dict(
        shape=np.zeros((3, 3)),
        text=np.array([["a", "b"]]),
        nan=np.full((3, 2), np.nan),
        empty=np.zeros((0, 2)),
        flat=np.zeros(4),
    ).items():
        np.save(tmp_path / f"{name}.npy", bad)
        with pytest.raises(fmd.UserError):
            fmd.ToyData(str(tmp_path / f"{name}.npy"))
    (tmp_path / "junk.npy").write_text("junk")
    for name in ("junk", "missing"):
        with pytest.raises(fmd.UserError, match="numpy.save"):
            fmd.ToyData(str(tmp_path / f"{name}.npy"))


def test_relative_error_by_hand():
    truth = images([1.0, 0.0], [-1.0, 0.0])  # spread: sqrt(1)
    assert fmd.relative_error(truth + images([0.3, 0.4]), truth) == pytest.approx(0.5)
    assert fmd.relative_error(truth + images([0.3, 0.4]), truth, reference=2 * truth) == pytest.approx(0.25)


def test_endpoint_error_of_exact_and_of_shifted_students():
    z = noise(4000, 2, 1, 1)
    assert fmd.endpoint_error(GaussianMap(), gaussian_teacher(), z) < 1e-5
    spread = (
        (fmd.solve_ode(gaussian_teacher(), z, 64, "rk4").flatten(1).var(0, correction=0).sum() / 2)
        .sqrt()
        .item()
    )
    assert fmd.endpoint_error(GaussianMap(0.1), gaussian_teacher(), z) == pytest.approx(
        0.1 / spread, rel=1e-3
    )
    assert spread == pytest.approx(S, rel=0.05)
    truth = fmd.solve_ode(gaussian_teacher(), z, 8, "rk4", return_path=True)
    found = fmd.student_path(GaussianMap(0.1), z, 8)
    errors = fmd.error_along_path(found, truth)
    assert errors == pytest.approx([0.1 * i / 8 / spread for i in range(9)], abs=1e-3)


def test_sliced_w2_of_a_shift_and_of_a_scale():
    x = noise(4000, 2, 1, 1)
    assert fmd.sliced_w2(x, x[torch.randperm(4000)]) == pytest.approx(0, abs=1e-12)
    # the mean of (direction . v)^2 over directions of the plane is |v|^2 / 2
    assert fmd.sliced_w2(x, x + images([0.6, 0.8]), 1000) == pytest.approx(0.5**0.5, rel=0.04)
    assert fmd.sliced_w2(x, 3 * x, 500) == pytest.approx(2, rel=0.05)
    with pytest.raises(ValueError):
        fmd.sliced_w2(x, x[:5])


def test_coverage_counts_by_hand():
    toy = fmd.TOYS["checkerboard"]
    corners = toy.skeleton(torch.arange(8), torch.zeros(8, 2))
    inside = (corners + 0.5)[:, :, None, None]
    assert fmd.coverage(toy, inside) == dict(outside=0.0, emptiest=1.0)
    hole = inside[:1] + images([1.0, 0.0]).float()
    found = fmd.coverage(toy, torch.cat([inside, inside, hole, hole]))
    assert found["outside"] == pytest.approx(2 / 18) and found["emptiest"] == pytest.approx(2 * 8 / 18)
    assert fmd.coverage(toy, inside[1:])["emptiest"] == 0


def test_samples_are_one_jump_from_the_noise():
    student = small(fmd.FlowMap).float()
    calls, forward = [], student.forward
    student.forward = lambda *a: (calls.append(1), forward(*a))[1]
    y = torch.tensor([0, 1, 2, 3])
    x = fmd.sample(student, 4, y, generator=fmd.generator(5))
    z = torch.randn(4, 2, 1, 1, generator=fmd.generator(5))
    assert len(calls) == 1
    torch.testing.assert_close(x, z + forward(z, torch.ones(4), y).detach())


# ------------------------------------------------------------------------------------------------- pictures


def test_pictures_show_what_they_are_given():
    path, other = torch.randn(5, 7, 2, 1, 1), torch.randn(5, 7, 2, 1, 1)
    figure = fmd.plot_paths(path, other)
    lines = figure.axes[0].lines
    assert len(lines) == 14
    np.testing.assert_allclose(lines[2].get_xydata(), path[:, 2, :, 0, 0].numpy(), rtol=1e-6)
    np.testing.assert_allclose(lines[9].get_xydata(), other[:, 2, :, 0, 0].numpy(), rtol=1e-6)
    assert {line.get_color() for line in lines[:7]} == {fmd.COLORS["teacher"]}
    assert {line.get_color() for line in lines[7:]} == {fmd.COLORS["student"]}
    figure = fmd.plot_samples({"data": path[0], "student": other[0]})
    np.testing.assert_allclose(
        figure.axes[1].collections[0].get_offsets(), other[0].flatten(1).numpy(), rtol=1e-6
    )
    assert figure.axes[0].get_xlim() == figure.axes[1].get_xlim()
    figure = fmd.plot_error({"student": [0.0, 0.1, 0.3]})
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), [0.0, 0.1, 0.3])
    figure = fmd.plot_losses(
        [dict(stage="teacher", step=1, flow_matching=2.0), dict(stage="student", step=1, prediction=0.5)]
    )
    assert [list(line.get_ydata()) for axis in figure.axes for line in axis.lines] == [[2.0], [0.5], [], []]
    matplotlib.pyplot.close("all")


def test_animation_ends_on_the_samples(tmp_path):
    path, other = torch.randn(5, 7, 2, 1, 1), torch.randn(5, 7, 2, 1, 1)
    animation = fmd.animate_paths(path, other, frames=3)
    fmd.save_figure(animation, tmp_path / "a.gif")
    clouds = [axis.collections[0] for axis in animation._fig.axes]
    np.testing.assert_allclose(clouds[0].get_offsets(), path[-1].flatten(1).numpy(), rtol=1e-6)
    np.testing.assert_allclose(clouds[1].get_offsets(), other[-1].flatten(1).numpy(), rtol=1e-6)
    assert (tmp_path / "a.gif").read_bytes()[:3] == b"GIF" and [p.name for p in tmp_path.iterdir()] == [
        "a.gif"
    ]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file.txt"
    fmd.save(path, lambda p: p.write_text("first"))

    def fail(p):
        p.write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        fmd.save(path, fail)
    assert path.read_text() == "first" and [p.name for p in tmp_path.iterdir()] == ["file.txt"]


# ------------------------------------------------------------------------------------------------- command line


def weights(path, keys=("model", "ema", "critic")):
    checkpoint = torch.load(path, weights_only=True)
    return {f"{k}.{name}": v for k in keys for name, v in checkpoint.get(k, {}).items()}


def assert_equal_runs(a, b):
    for name in ("teacher.pt", "student.pt"):
        left, right = weights(a / name), weights(b / name)
        assert left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def run(*args, status=0, capsys=None):
    """fmd's main on the arguments; the last line of standard error if there is one."""
    try:
        found = fmd.main([str(a) for a in args])
    except SystemExit as e:
        found = e.code
    lines = capsys.readouterr().err.strip().splitlines() if capsys else []
    assert found == status, lines
    return lines[-1] if lines else ""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    run("--out", out, *TINY)
    return out


def test_the_teachers_batch_goes_in_groups_of_one_label():
    config = fmd.Config(**{**fmd.PRESETS["toy2d"], "teacher_batch_size": 80})
    batch = fmd.draw_data(fmd.ToyData("checkerboard"), config, 0)
    assert len(batch["x"]) == len(batch["n"]) == 80 and len(batch["t"]) == len(batch["y"]) == 10
    x, y = fmd.ToyData("checkerboard").draw(80, fmd.generator(0), 8)
    column, row = (x[:, :, 0, 0] + 2).floor().long().T
    cell = 2 * row + (column - row % 2) // 2  # the cells, numbered row by row
    assert torch.equal(cell, y.repeat_interleave(8))
    # 75 % and 25 %, in whole groups
    assert fmd.Config(batch_size=48, group_size=8).corrections == 16
    assert fmd.evaluations_per_step(fmd.Config(batch_size=48, group_size=8)) == 32 * 4 + 16


def test_the_default_command_end_to_end(finished):
    assert {p.name for p in finished.iterdir()} == {
        "teacher.pt",
        "student.pt",
        "metrics.json",
        "metrics.jsonl",
        "comparison.png",
        "paths.png",
        "error.png",
        "losses.png",
        "paths.gif",
    }
    metrics = json.loads((finished / "metrics.json").read_text())
    assert {
        "endpoint_error",
        "sw2",
        "sw2_floor",
        "teacher_seconds",
        "student_seconds",
        "teacher_evaluations",
        "nfe",
        "seed",
        "config",
        "versions",
        "coverage",
        "error_along_path",
    } <= metrics.keys()
    assert metrics["teacher_evaluations"] == 12 * (12 * 8 + 4) and metrics["nfe"] == 1
    assert (
        metrics["error_along_path"][0] == 0 and metrics["error_along_path"][-1] == metrics["endpoint_error"]
    )
    assert metrics["config"]["steps"] == 12 and metrics["config"]["label_dropout"] == 0.75
    # the figures, again and from the files
    teacher, student = fmd.load_teacher(finished / "teacher.pt"), fmd.load_student(finished / "student.pt")
    z = torch.randn(2, 200, 2, 1, 1, generator=fmd.generator(0, fmd.EVALUATION, 1))
    assert metrics["endpoint_error"] == pytest.approx(
        fmd.endpoint_error(student, teacher, z[0], steps=8), rel=1e-4
    )
    ends = [fmd.solve_ode(teacher, noises, 8, "rk4") for noises in z]
    assert metrics["sw2_floor"] == pytest.approx(fmd.sliced_w2(*ends), rel=1e-4)
    jump = student.map(z[0], torch.ones(200)).detach()
    assert metrics["sw2"] == pytest.approx(fmd.sliced_w2(jump, ends[1]), rel=1e-4)
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["stage"] == "teacher"] == [3, 6, 8]
    assert [line["step"] for line in lines if line["stage"] == "student"] == [3, 6, 9, 12]
    assert {"prediction", "correction", "critic", "lambda", "endpoint_error"} <= lines[-1].keys()


def test_a_file_from_before_start_time_had_its_name_still_loads(finished, tmp_path):
    file = torch.load(finished / "teacher.pt", weights_only=True)
    file["network"]["start"] = file["network"].pop("start_time")
    torch.save(file, tmp_path / "old.pt")
    old, new = fmd.load_teacher(tmp_path / "old.pt"), fmd.load_teacher(finished / "teacher.pt")
    assert old.settings == new.settings and torch.equal(old.pos_embed, new.pos_embed)


def test_loaders_give_the_averaged_weights(finished):
    for load, name, cls in (
        (fmd.load_teacher, "teacher", fmd.DiT),
        (fmd.load_student, "student", fmd.FlowMap),
    ):
        network = load(finished / f"{name}.pt")
        expected = weights(finished / f"{name}.pt", ["ema"])
        assert type(network) is cls and not any(p.requires_grad for p in network.parameters())
        assert all(torch.equal(v, expected["ema." + k]) for k, v in network.state_dict().items())
        assert any(
            not torch.equal(v, expected["ema." + k[6:]])
            for k, v in weights(finished / f"{name}.pt", ["model"]).items()
        )


def test_distillation_from_a_file_touches_no_data(finished, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("data was touched")

    monkeypatch.setattr(fmd.ToyData, "__init__", refuse)
    monkeypatch.setattr(fmd.ToyData, "draw", refuse)
    run("--stage", "distill", "--teacher", finished / "teacher.pt", "--out", tmp_path / "a", *TINY)
    run("--teacher", finished / "teacher.pt", "--out", tmp_path / "b", *TINY)
    for name in ("a", "b"):
        assert not (tmp_path / name / "teacher.pt").exists()
        metrics = json.loads((tmp_path / name / "metrics.json").read_text())
        assert metrics["coverage"].keys() == {"teacher", "student"}
        assert all(
            torch.equal(v, weights(finished / "student.pt")[k])
            for k, v in weights(tmp_path / name / "student.pt").items()
        )


@pytest.mark.parametrize("moment", ["teacher", "student"])
def test_an_interrupted_run_resumes_to_the_same_bits(finished, tmp_path, monkeypatch, capsys, moment):
    name = {"teacher": "draw_data", "student": "draw_prior"}[moment]
    draw = getattr(fmd, name)

    def interrupting(*args):
        if args[-1] == 5:
            os.kill(os.getpid(), signal.SIGTERM if moment == "student" else signal.SIGINT)
        return draw(*args)

    monkeypatch.setattr(fmd, name, interrupting)
    line = run("--out", tmp_path, "--resume", *TINY, status=1, capsys=capsys)  # nothing there yet: it begins
    assert "step 6" in line and f"python fmd.py --out {tmp_path} --resume" in line
    assert torch.load(tmp_path / f"{moment}.pt", weights_only=True)["step"] == 6
    monkeypatch.undo()
    line = run("--out", tmp_path, *TINY, status=2, capsys=capsys)
    assert "--resume" in line and "--overwrite" in line
    run("--out", tmp_path, "--resume")  # the settings come from the file
    assert_equal_runs(finished, tmp_path)
    steps = [
        [line["step"] for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())]
        for out in (finished, tmp_path)
    ]
    assert sorted(set(steps[0])) == sorted(set(steps[1]) - {6} | {6})
    before = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    run("--out", tmp_path, "--resume")
    assert "is finished" in capsys.readouterr().out and before == {
        p: p.stat().st_mtime_ns for p in tmp_path.iterdir()
    }


def test_a_killed_run_resumes_to_the_same_bits(finished, tmp_path):
    command = [sys.executable, fmd.__file__, "--out", str(tmp_path), "--resume", *TINY]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "student.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.wait()
    for path in tmp_path.glob("*.pt"):
        assert "step" in torch.load(path, weights_only=True)  # nothing is half written
    with open(tmp_path / "metrics.jsonl", "a") as log:
        log.write('{"stage": "student", "st')  # as a kill can leave it
    run("--out", tmp_path, "--resume", *TINY)
    assert_equal_runs(finished, tmp_path)
    steps = [line["step"] for line in fmd.read_log(tmp_path / "metrics.jsonl") if line["stage"] == "student"]
    assert steps == [3, 6, 9, 12]


def test_a_run_goes_on_with_a_lower_learning_rate(finished, tmp_path):
    for name in ("teacher.pt", "student.pt"):
        shutil.copy(finished / name, tmp_path)
    run(
        "--out",
        tmp_path,
        "--resume",
        "--steps",
        "16",
        "--learning-rate",
        "1e-9",
        "--critic-learning-rate",
        "0",
    )
    old, new = (weights(out / "student.pt") for out in (finished, tmp_path))
    for name in old:
        if not name.startswith("ema."):
            torch.testing.assert_close(new[name], old[name], rtol=0, atol=1e-8)
    checkpoint = torch.load(tmp_path / "student.pt", weights_only=True)
    assert checkpoint["step"] == 16 and checkpoint["config"]["learning_rate"] == 1e-9


def test_a_larger_number_of_steps_goes_on(finished, tmp_path):
    for name in ("teacher.pt", "student.pt", "metrics.json", "metrics.jsonl"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    run(
        "--stage",
        "distill",
        "--teacher",
        tmp_path / "teacher.pt",
        "--out",
        tmp_path,
        "--resume",
        "--steps",
        "15",
    )
    assert torch.load(tmp_path / "student.pt", weights_only=True)["step"] == 15
    assert json.loads((tmp_path / "metrics.json").read_text())["config"]["steps"] == 15


def test_stages_one_by_one_equal_all_at_once(finished, tmp_path):
    run("--stage", "teacher", "--out", tmp_path, *TINY)
    assert {p.name for p in tmp_path.iterdir()} == {"teacher.pt", "metrics.jsonl"}
    run("--stage", "distill", "--out", tmp_path, *TINY)
    run("--stage", "evaluate", "--out", tmp_path, "--overwrite")
    assert_equal_runs(finished, tmp_path)
    a, b = (json.loads((out / "metrics.json").read_text()) for out in (finished, tmp_path))
    for key in ("endpoint_error", "sw2", "sw2_floor", "coverage", "config", "teacher_evaluations"):
        assert a[key] == b[key]


def test_overwriting_leaves_no_student_of_the_run_that_was_replaced(finished, tmp_path, monkeypatch, capsys):
    for name in ("teacher.pt", "student.pt", "metrics.json"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    draw = fmd.draw_data

    def interrupting(*args):
        if args[-1] == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return draw(*args)

    monkeypatch.setattr(fmd, "draw_data", interrupting)
    run("--out", tmp_path, "--overwrite", "--seed", "5", *TINY, status=1)
    assert {p.name for p in tmp_path.iterdir()} == {"teacher.pt", "metrics.jsonl"}
    monkeypatch.undo()
    run("--out", tmp_path, "--resume")
    run("--out", tmp_path / "fresh", "--seed", "5", *TINY)
    assert_equal_runs(tmp_path, tmp_path / "fresh")


def test_threads_are_no_more_than_asked_for(tmp_path):
    torch.set_num_threads(2)
    try:
        run("--out", tmp_path, "--threads", "1", *TINY)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(1)
    assert json.loads((tmp_path / "metrics.json").read_text())["threads"] == 1


def test_regression_end_to_end_and_repeated(finished, tmp_path, capsys):
    flags = ["--stage", "distill", "--teacher", finished / "teacher.pt", "--method", "regression", *TINY]
    run(*flags, "--out", tmp_path / "a")
    metrics = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert metrics["config"]["method"] == "regression" and "coverage" in metrics
    run(*flags, "--out", tmp_path / "b", "--checkpoint-interval", "4")
    checkpoint = torch.load(tmp_path / "a" / "student.pt", weights_only=True)
    again = torch.load(tmp_path / "b" / "student.pt", weights_only=True)
    assert all(torch.equal(checkpoint["ema"][k], again["ema"][k]) for k in again["ema"])
    assert not any(k.startswith(("z", "phi")) for k in checkpoint["buffers"])  # pairs are solved again
    line = run("--out", tmp_path / "a", "--resume", "--steps", "99", status=2, capsys=capsys)
    assert "--steps 99 contradicts" in line  # more steps would be other pairs
    run("--out", tmp_path / "a", "--resume")
    assert capsys.readouterr().out.rstrip().endswith("is finished")


def test_meanflow_end_to_end_and_resumed(finished, tmp_path, monkeypatch, capsys):
    flags = ["--method", "meanflow", *TINY]
    run("--out", tmp_path / "all", *flags)  # teacher and rival
    metrics = json.loads((tmp_path / "all" / "metrics.json").read_text())
    assert metrics["config"]["method"] == "meanflow"
    flags = ["--stage", "distill", "--teacher", finished / "teacher.pt", *flags]
    run(*flags, "--out", tmp_path / "a")
    student = fmd.load_student(tmp_path / "a" / "student.pt")
    assert student.settings["start_time"] and fmd.sample(student, 5).shape == (5, 2, 1, 1)
    real = fmd.save

    def killed(path, write):
        real(path, write)
        if path.name == "student.pt" and torch.load(path, weights_only=True)["step"] == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(fmd, "save", killed)
    run(*flags, "--out", tmp_path / "b", "--checkpoint-interval", "4", status=1)
    monkeypatch.setattr(fmd, "save", real)
    run("--out", tmp_path / "b", "--resume")
    straight, resumed = (weights(tmp_path / name / "student.pt") for name in "ab")
    assert all(torch.equal(straight[k], resumed[k]) for k in straight)
    run("--stage", "sample", "--out", tmp_path / "b", "--samples", "10")
    np.save(tmp_path / "points.npy", np.zeros((9, 2)))
    run("--toy", tmp_path / "points.npy", *TINY, "--out", tmp_path / "c", "--stage", "teacher")
    (tmp_path / "points.npy").unlink()
    capsys.readouterr()
    flags = ["--stage", "distill", "--out", tmp_path / "c", "--method", "meanflow"]
    run(*flags, status=1)  # the one method that needs the data
    assert "points.npy" in capsys.readouterr().err
    run(*flags, "--guidance-interval", "0", "0.7", status=2)


def test_a_teacher_that_lies_in_the_folder_is_distilled_not_replaced(finished, tmp_path):
    shutil.copy(finished / "teacher.pt", tmp_path)
    before = (tmp_path / "teacher.pt").read_bytes()
    for overwrite in ([], ["--overwrite"]):
        run(
            "--teacher", tmp_path / "teacher.pt", "--out", tmp_path, *TINY, "--teacher-steps", "5", *overwrite
        )
        assert (tmp_path / "teacher.pt").read_bytes() == before
    assert_equal_runs(finished, tmp_path)


def test_a_folder_that_was_moved_goes_on(finished, tmp_path):
    run("--out", tmp_path / "a", *TINY)
    (tmp_path / "a").rename(tmp_path / "b")
    run("--stage", "evaluate", "--out", tmp_path / "b", "--overwrite")
    run("--out", tmp_path / "b", "--resume", "--steps", "14")
    assert torch.load(tmp_path / "b" / "student.pt", weights_only=True)["step"] == 14


def test_exact_teacher_run_is_scored_against_the_closed_form(tmp_path):
    run("--toy", "gaussians", "--exact-teacher", "--out", tmp_path, *TINY)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    student = fmd.load_student(tmp_path / "student.pt")
    toy = fmd.TOYS["gaussians"]
    exact = fmd.ExactTeacher(toy.skeleton(torch.arange(8), torch.zeros(8, 2)), torch.full((8,), toy.blur))
    z = torch.randn(2, 200, 2, 1, 1, generator=fmd.generator(0, fmd.EVALUATION, 1))[0]
    assert metrics["endpoint_error"] == pytest.approx(
        fmd.endpoint_error(student, exact, z, steps=8), rel=1e-4
    )


def test_sample_stage(finished, tmp_path, capsys):
    student = finished / "student.pt"
    run(
        "--stage",
        "sample",
        "--student",
        student,
        "--out",
        tmp_path / "a",
        "--samples",
        7,
        "--classes",
        "0,3",
        "--seed",
        4,
    )
    with np.load(tmp_path / "a" / "samples.npz") as file:
        points, labels = file["arr_0"], file["arr_1"]
    assert points.shape == (7, 2) and points.dtype == np.float32
    assert labels.tolist() == [0, 3, 0, 3, 0, 3, 0] and labels.dtype == np.int64
    block = torch.randn(fmd.SAMPLE_BLOCK, 2, 1, 1, generator=fmd.generator(4, fmd.SAMPLING, 0))
    x = fmd.jump(fmd.load_student(student), block[:7], torch.tensor(labels))
    np.testing.assert_allclose(points, x.flatten(1).numpy(), rtol=1e-5)
    assert (tmp_path / "a" / "samples.png").exists()
    run("--stage", "sample", "--student", student, "--out", tmp_path / "b", "--samples", 5)
    with np.load(tmp_path / "b" / "samples.npz") as file:
        assert file["arr_1"].tolist() == [8] * 5
    assert "there already" in run(
        "--stage", "sample", "--out", tmp_path / "b", "--student", student, status=2, capsys=capsys
    )
    for bad in (["--classes", "8"], ["--classes", "x"], ["--guidance", "2"], ["--samples", "0"]):
        line = run(
            "--stage", "sample", "--student", student, "--out", tmp_path / "c", *bad, status=2, capsys=capsys
        )
        assert line.startswith(f"fmd: {bad[0]}")
    assert not (tmp_path / "c" / "samples.npz").exists()


def test_a_student_trained_over_a_range_of_guidance_samples_at_any_strength_of_it(finished, tmp_path, capsys):
    run("--teacher", finished / "teacher.pt", "--out", tmp_path, "--guidance-max", 4, *TINY)
    points = []
    for strength in (1, 4):
        run(
            "--stage",
            "sample",
            "--out",
            tmp_path,
            "--classes",
            "1",
            "--guidance",
            strength,
            "--samples",
            50,
            "--overwrite",
        )
        points.append(np.load(tmp_path / "samples.npz")["arr_0"])
    assert np.abs(points[0] - points[1]).max() > 0
    line = run(
        "--stage", "sample", "--out", tmp_path, "--guidance", "5", "--overwrite", status=2, capsys=capsys
    )
    assert "1.0 to 4.0" in line


def test_a_toy_of_ones_own_end_to_end(tmp_path, monkeypatch):
    np.save(tmp_path / "p.npy", np.random.default_rng(0).normal(size=(50, 2)))
    monkeypatch.chdir(tmp_path)
    run("--toy", "p.npy", *TINY)
    run("--toy", "p.npy", *TINY)
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {"toy2d", "toy2d-2"}  # each run its own folder
    assert "coverage" not in json.loads((tmp_path / "runs" / "toy2d" / "metrics.json").read_text())
    assert fmd.load_teacher(tmp_path / "runs" / "toy2d" / "teacher.pt").num_classes == 0
    run("--stage", "sample", "--samples", 3)
    assert (tmp_path / "runs" / "toy2d-2" / "samples.npz").exists()  # the newest


BAD_COMMANDS = [
    (["--nonsense", "1"], "nonsense"),
    (["--stage", "nothing"], "teacher"),
    (["--dataset", "nothing"], "toy2d"),
    (["--toy", "nothing"], "checkerboard"),
    (["--steps", "0"], "--steps"),
    (["--steps", "-3"], "--steps"),
    (["--teacher-steps", "0"], "--teacher-steps"),
    (["--steps", "many"], "--steps"),
    (["--batch-size", "1"], "--batch-size"),
    (["--batch-size", "0"], "--batch-size"),
    (["--learning-rate", "nan"], "--learning-rate"),
    (["--learning-rate", "inf"], "--learning-rate"),
    (["--learning-rate", "-1"], "--learning-rate"),
    (["--correction-share", "1.5"], "--correction-share"),
    (["--batch-size", "100"], "multiple of --group-size 8"),
    (["--batch-size", "8"], "--batch-size 8 cannot be split"),
    (["--hidden-size", "30"], "--hidden-size"),
    (["--exact-teacher"], "gaussians"),
    (["--exact-teacher", "--toy", "moons"], "gaussians"),
    (["--prediction", "guess"], "jvp"),
    (["--device", "quantum"], "--device cpu"),
    (["--guidance-min", "2"], "--guidance-max"),
    (["--stage", "sample", "--teacher", "x.pt"], "--teacher"),
    (["--student", "x.pt"], "--student"),
    (["--seed", "-1"], "--seed"),
    (["--decay", "2"], "--decay"),
    (["--dataset", "imagenet"], "sit-xl/2-256"),
    (["--dataset", "imagenet", "--flip"], "--flip"),
    (["--prediction", "difference", "--precision", "bfloat16"], "--precision float32"),
    (["--dataset", "imagenet", "--quick"], "--quick"),
    (["--resume", "--overwrite"], "contradict"),
    (["--latents", "x.npy"], "--dataset imagenet"),
    (["--micro-batch-size", "3"], "--batch-size 256 cannot be dealt"),
    (["--teacher-batch-size", "8", "--micro-batch-size", "4"], "--micro-batch-size"),
    (["--teacher-format", "dit"], "sit, repa"),
    (["--encode", "x"], "--latents"),
    (["--encode", "x", "--latents", "y.npy", "--image-size", "100"], "multiple of 8"),
]


@pytest.mark.parametrize("args, hint", BAD_COMMANDS, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_a_command_that_cannot_be_right(args, hint, tmp_path, capsys):
    line = run("--out", tmp_path / "out", *args, status=2, capsys=capsys)
    assert line.startswith("fmd: ") and hint in line and "Traceback" not in line
    assert not (tmp_path / "out").exists()


def test_a_device_that_is_not_there(tmp_path, capsys, monkeypatch):
    def absent(*args, device, **kwargs):
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr(fmd.torch, "zeros", absent)
    assert "--device cpu" in run("--out", tmp_path / "out", "--device", "cuda", status=2, capsys=capsys)


def damaged(kind, finished, path):
    data = (finished / "teacher.pt").read_bytes()
    checkpoint = torch.load(finished / "teacher.pt", weights_only=True)
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "text":
        path.write_text("not a checkpoint at all")
    elif kind == "state dict":
        torch.save(checkpoint["model"], path)
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "student":
        path.write_bytes((finished / "student.pt").read_bytes())
    elif kind == "pickled":
        torch.save({**checkpoint, "extra": Path("x")}, path)
    elif kind == "shapes":
        torch.save({**checkpoint, "network": {**checkpoint["network"], "hidden_size": 32}}, path)
    elif kind == "names":
        ema = dict(checkpoint["ema"])
        ema["blocks.7.attn.proj.bias"] = ema.pop("blocks.0.attn.proj.bias")
        torch.save({**checkpoint, "ema": ema}, path)
    elif kind == "settings":
        torch.save({**checkpoint, "config": {**checkpoint["config"], "colour": "red"}}, path)


@pytest.mark.parametrize(
    "kind, hint",
    [
        ("missing", "there is no"),
        ("empty", "cannot be read"),
        ("truncated", "cannot be read"),
        ("text", "pickled"),
        ("state dict", "--teacher-format"),
        ("list", "not a teacher"),
        ("student", "not a teacher"),
        ("pickled", "pickled"),
        ("shapes", "blocks.0.adaLN_modulation.1.weight"),
        ("names", "blocks.0.attn.proj.bias, blocks.7.attn.proj.bias"),
        ("settings", "colour"),
    ],
)
def test_a_teacher_that_cannot_be_used(kind, hint, finished, tmp_path, capsys):
    path = tmp_path / "teacher.pt"
    damaged(kind, finished, path)
    line = run(
        "--stage",
        "distill",
        "--teacher",
        path,
        "--out",
        tmp_path / "out",
        *TINY[10:],
        status=1,
        capsys=capsys,
    )
    assert line.startswith("fmd: ") and str(path) in line and hint in line
    with pytest.raises(fmd.UserError):
        fmd.load_teacher(path)


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    line = run("--out", tmp_path / "file" / "out", *TINY, status=1, capsys=capsys)
    assert line.startswith("fmd: ") and "another --out" in line


def test_a_full_disk_leaves_the_last_checkpoint(finished, tmp_path, monkeypatch, capsys):
    written, torch_save = [], torch.save

    def full(checkpoint, path):
        written.append(checkpoint["step"])
        if checkpoint["kind"] == "student" and checkpoint["step"] == 8:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        torch_save(checkpoint, path)

    monkeypatch.setattr(fmd.torch, "save", full)
    line = run("--out", tmp_path, *TINY, status=1, capsys=capsys)
    assert "No space left" in line
    monkeypatch.undo()
    assert torch.load(tmp_path / "student.pt", weights_only=True)["step"] == 4
    run("--out", tmp_path, "--resume")
    assert_equal_runs(finished, tmp_path)


def test_other_settings_are_refused_by_resume_and_named(finished, tmp_path, capsys):
    for name in ("teacher.pt", "student.pt"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    for args in (
        ["--alpha", "0.7"],
        ["--seed", "1"],
        ["--toy", "moons"],
        ["--steps", "5"],
        ["--teacher-steps", "9"],
    ):
        line = run("--out", tmp_path, "--resume", *args, status=2, capsys=capsys)
        assert line.startswith(f"fmd: {args[0]} {args[1]} contradicts")
    run("--out", tmp_path, "--resume", "--log-interval", "1", "--checkpoint-interval", "2")
    line = run(
        "--teacher",
        finished / "teacher.pt",
        "--toy",
        "moons",
        "--out",
        tmp_path / "x",
        status=2,
        capsys=capsys,
    )
    assert "--toy moons contradicts checkerboard" in line


def test_a_student_does_not_go_on_with_another_teacher(finished, tmp_path, capsys):
    run("--stage", "teacher", *TINY, "--seed", "1", "--out", tmp_path / "other")
    run("--stage", "distill", "--teacher", finished / "teacher.pt", *TINY, "--out", tmp_path / "run")
    flags = ["--out", tmp_path / "run", "--resume", "--steps", "50"]
    before = (tmp_path / "run" / "student.pt").read_bytes()
    line = run(*flags, "--teacher", tmp_path / "other" / "teacher.pt", status=2, capsys=capsys)
    assert "began with another teacher" in line and (tmp_path / "run" / "metrics.json").exists()
    assert (tmp_path / "run" / "student.pt").read_bytes() == before
    (tmp_path / "moved.pt").write_bytes((finished / "teacher.pt").read_bytes())
    run(*flags, "--teacher", tmp_path / "moved.pt")


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_checkpoint(
    finished, tmp_path, monkeypatch, capsys
):
    draw = fmd.draw_prior

    def poisoned(shape, num_classes, config, step):
        batch = draw(shape, num_classes, config, step)
        if step >= 6 and step != 8:
            batch["z"][0] = math.nan
        return batch

    monkeypatch.setattr(fmd, "draw_prior", poisoned)
    line = run("--out", tmp_path, *TINY, "--steps", "30", status=1, capsys=capsys)
    assert "step 19" in line and "lower learning rate" in line
    checkpoint = torch.load(tmp_path / "student.pt", weights_only=True)
    assert checkpoint["step"] == 16 and all(v.isfinite().all() for v in checkpoint["model"].values())


def test_pictures_of_a_toy_show_all_its_points(finished, tmp_path, monkeypatch):
    seen = {}
    for name in ("plot_paths", "animate_paths", "plot_samples"):
        plot = getattr(fmd, name)
        monkeypatch.setattr(fmd, name, lambda *a, name=name, plot=plot: seen.update({name: a}) or plot(*a))
    run("--stage", "evaluate", "--student", finished / "student.pt", "--out", tmp_path)
    for name in ("plot_paths", "animate_paths"):
        assert [len(path) for path in seen[name]] == [9, 9] and [path.shape[1] for path in seen[name]] == [
            200,
            200,
        ]
    assert {k: len(x) for k, x in seen["plot_samples"][0].items()} == dict(data=200, teacher=200, student=200)


def test_an_interrupt_while_measuring_and_an_unexpected_error(finished, tmp_path, monkeypatch, capsys):
    for name in ("teacher.pt", "student.pt"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    for error, hint in (
        (KeyboardInterrupt(), "--resume goes on"),
        (RuntimeError("CUDA out of memory"), "--batch-size"),
        (ZeroDivisionError("odd\nthing"), "ZeroDivisionError: odd thing (--debug shows where)"),
    ):

        def fail(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(fmd, "plot_paths", fail)
        line = run("--out", tmp_path, "--resume", status=1, capsys=capsys)
        assert line.startswith("fmd: ") and hint in line and not (tmp_path / "metrics.json").exists()
        with pytest.raises(type(error)):
            fmd.main(["--out", str(tmp_path), "--resume", "--debug"])
    monkeypatch.undo()
    run("--out", tmp_path, "--resume")
    assert (tmp_path / "metrics.json").exists()


def test_every_setting_is_a_flag_with_help():
    text = fmd.make_parser().format_help()
    for field in dataclasses.fields(fmd.Config):
        assert fmd.flag(field.name) in text and field.metadata["help"].split()[0] in text
    assert "python fmd.py --toy spirals" in text
    with pytest.raises(ValueError, match="jvp, difference, step"):
        fmd.prediction_gradient(GaussianMap(), gaussian_teacher(), noise(2, 2, 1, 1), times(2), form="guess")


def test_readme_names_what_exists():
    text = (Path(fmd.__file__).parent / "README.md").read_text()
    for word in set(re.findall(r"`--([a-z-]+)", text)):
        assert "--" + word in fmd.make_parser().format_help(), word
    for word in set(re.findall(r"`(\w+)\(\)`", text)):
        assert hasattr(fmd, word), word
    for path in set(re.findall(r"\]\((assets/[^)]+)\)", text)):
        assert (Path(fmd.__file__).parent / path).exists(), path


# ----------------------------------------------------------------------------------------------- small pictures


def write_idx(folder, pictures, labels):
    """MNIST's four files, (N, 28, 28) and (N,) uint8, as torchvision looks for them."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        head = np.array([2051, len(pictures), 28, 28], ">i4").tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(head + pictures.tobytes())
        head = np.array([2049, len(labels)], ">i4").tobytes()
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(head + labels.tobytes())
    return raw


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A folder with scikit-learn's digits, 8 x 8, at MNIST's size and in its format; the pictures; the labels."""
    found = sklearn.datasets.load_digits()
    x = torch.as_tensor(found.images, dtype=torch.float32)[:, None]
    x = torch.nn.functional.interpolate(x, (28, 28), mode="bilinear")[:, 0]
    x, y = (x * 255 / 16).to(torch.uint8).numpy(), found.target.astype(np.uint8)
    folder = tmp_path_factory.mktemp("data")
    write_idx(folder, x, y)
    return folder, x, y


TINY_PICTURES = [
    "--dataset",
    "mnist",
    "--quick",
    "--patch-size",
    "7",
    "--hidden-size",
    "16",
    "--num-heads",
    "2",
]
TINY_PICTURES += ["--depth", "1", "--batch-size", "8", "--teacher-batch-size", "8", "--teacher-steps", "6"]
TINY_PICTURES += ["--steps", "6", "--eval-samples", "30", "--eval-paths", "20", "--eval-batch-size", "16"]
TINY_PICTURES += [
    "--solver-steps",
    "4",
    "--log-interval",
    "3",
    "--checkpoint-interval",
    "3",
    "--device",
    "cpu",
]


@pytest.fixture(scope="module")
def pictures(digits, tmp_path_factory):
    out = tmp_path_factory.mktemp("pictures") / "run"
    run("--data", digits[0], "--out", out, *TINY_PICTURES)
    return out


@pytest.mark.parametrize("group", [1, 4])
def test_digits_are_drawn_as_they_are(digits, group):
    folder, x, y = digits
    data = fmd.PictureData("mnist", folder)
    drawn, labels = data.draw(2000, fmd.generator(0), group)
    assert data.shape == (1, 28, 28) and drawn.shape == (2000, 1, 28, 28) and len(labels) == 2000 // group
    labels = labels.repeat_interleave(group)
    pixels = torch.round((drawn + 1) * 127.5).to(torch.uint8).flatten(1)
    known = {picture.tobytes(): label for picture, label in zip(x, y)}
    assert [known[p.numpy().tobytes()] for p in pixels] == labels.tolist()
    assert len({p.numpy().tobytes() for p in pixels}) > 1000  # of 1797, in 2000 draws
    found, due = labels.bincount(minlength=10) / 2000, np.bincount(y) / len(y)
    np.testing.assert_allclose(found, due, atol=0.06 if group > 1 else 0.03)


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """CIFAR-10 of 50 pictures in its own format, of whose md5 sums torchvision is told."""
    folder, rng = tmp_path / "cifar-10-batches-py", np.random.default_rng(0)
    folder.mkdir()
    pixels, labels = rng.integers(0, 256, (50, 3072), dtype=np.uint8), (np.arange(50) % 10).tolist()
    sums = {}
    for name, content in (
        ("data_batch_1", {"data": pixels, "labels": labels}),
        ("test_batch", {"data": pixels, "labels": labels}),
        ("batches.meta", {"label_names": list("abcdefghij")}),
    ):
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "train_list", [["data_batch_1", sums["data_batch_1"]]])
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "meta", meta)
    return tmp_path, pixels.reshape(50, 3, 32, 32), labels


def test_cifar_is_drawn_as_it_is_and_mirrored(cifar):
    folder, x, y = cifar
    known = {picture.tobytes(): label for picture, label in zip(x, y)}
    for flip in (False, True):
        drawn, labels = fmd.PictureData("cifar10", folder, flip).draw(400, fmd.generator(1))
        assert drawn.shape == (400, 3, 32, 32)
        pixels = torch.round((drawn + 1) * 127.5).to(torch.uint8).numpy()
        straight = [p.tobytes() in known for p in pixels]
        assert 150 < sum(straight) < 250 if flip else all(straight)
        for picture, label in zip(pixels, labels):
            found = known.get(picture.tobytes(), known.get(picture[:, :, ::-1].tobytes()))
            assert found == label


@pytest.mark.parametrize("what", ["missing", "cut", "labels", "cifar"])
def test_data_that_cannot_be_had_is_one_line(what, digits, cifar, tmp_path, monkeypatch, capsys):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    folder, name = tmp_path / "elsewhere", "mnist"
    if what == "cut":
        path = write_idx(folder, digits[1], digits[2]) / "train-images-idx3-ubyte"
        path.write_bytes(path.read_bytes()[:-1000])
    if what == "labels":
        write_idx(folder, digits[1], digits[2][:-5])
    if what == "cifar":
        path = cifar[0] / "cifar-10-batches-py" / "data_batch_1"
        path.write_bytes(path.read_bytes()[:-1000])
        folder, name = cifar[0], "cifar10"
    flags = ["--dataset", name, "--data", folder, "--out", tmp_path / "out", *TINY_PICTURES[2:]]
    line = run(*flags, status=1, capsys=capsys)
    assert line.startswith("fmd:") and str(folder) in line and "--data" in line
    assert not (tmp_path / "out").exists()


def test_no_step_and_no_difference_straddles_the_edge_of_an_interval():
    for form, low, high in (("step", 0.2, 0.7), ("difference", 0.0, 0.7), ("jvp", 0.3, 1.0)):
        config = fmd.Config(
            batch_size=4000,
            prediction=form,
            guidance_max=2.0,
            guidance_interval=(low, high),
            correction_share=0.0,
        )
        batch = fmd.draw_prior((2, 1, 1), 5, config, 0)
        end, h = 1 - batch["delta"], batch["h"]
        first, last = (
            (end - h, end + h) if form == "difference" else (end, end + (h if form == "step" else 0))
        )
        for edge in (low, high):
            if 0 < edge < 1:
                assert ((last < edge) | (first > edge)).all()
                assert ((end - edge).abs() < 0.1).float().mean() > 0.15  # and yet it is approached
        assert (h > 0).all() and (0 < end + h).all() and (end >= 0).all() and (end + h <= 1.006).all()
    free = dataclasses.replace(config, guidance_max=1.0, prediction="step")
    batch = fmd.draw_prior((2, 1, 1), 5, free, 0)
    assert (
        batch["h"] >= torch.minimum(batch["delta"], torch.tensor(0.125))
    ).all()  # unguided: nothing to avoid


@pytest.mark.parametrize("edge", [0.8, 0.997, 0.004])
def test_predictions_near_an_edge_stay_on_the_path(edge):
    config = fmd.Config(guidance_max=3.0, guidance_interval=(0.0, edge), batch_size=256)
    for form in ("step", "difference", "jvp"):
        for step in range(50):
            batch = fmd.draw_prior((2, 1, 1), 3, dataclasses.replace(config, prediction=form), step)
            delta, h = batch["delta"][: len(batch["h"])], batch["h"]
            assert delta.min() >= 1e-3 and delta.max() <= 1 and (form != "step" or (delta - h).min() >= -1e-6)
            assert (h > 0).all()


def test_each_loss_asks_the_teacher_with_its_own_interval(monkeypatch):
    asked, true = [], fmd.guided

    def spy(teacher, guidance, interval=(0.0, 1.0)):
        asked.append(interval)
        return true(teacher, guidance, interval)

    monkeypatch.setattr(fmd, "guided", spy)
    config = fmd.Config(
        batch_size=16, guidance_max=3.0, guidance_interval=(0.0, 0.6), correction_interval=(0.0, 0.3),
        label_dropout=0.0, correction_share=0.5, prediction="jvp", decay=0.0,
    )  # fmt: skip
    start = small().float()
    distiller = fmd.make_distiller(start, config)
    batch = fmd.draw_prior(start.shape, start.num_classes, config, 0)
    asked.clear()
    figures = distiller(batch)[1]
    assert asked == [(0.0, 0.6), (0.0, 0.3)]
    # by hand: at the start v_N is the teacher's own, so D_N is what guidance adds where it acts
    z, n, y, r, gamma = batch["z"][8:], batch["n"], batch["y"][8:], batch["r"], batch["guidance"][8:]
    with torch.no_grad():
        x_r = column(1 - r) * (z + distiller.network(z, torch.ones(8), y)) + column(r) * n
        added = column(torch.where(r <= 0.3, gamma - 1, 0.0)) * (start(x_r, r, y) - start(x_r, r))
    assert figures["correction"].item() == pytest.approx(added.square().mean().item(), rel=1e-3)


def test_the_solver_steps_over_the_edge_of_an_interval():
    teacher = fmd.ExactTeacher(torch.tensor([[1.0, 0.5], [-1.0, 0.0]]), torch.tensor([0.5, 0.5]))
    u, z, y = fmd.guided(teacher, 3.0, (0.0, 0.7)), noise(200, 2, 1, 1).float(), torch.arange(200) % 2
    rough, fine = (fmd.solve_ode(u, z, steps, "rk4", y) for steps in (64, 2000))
    assert fmd.relative_error(rough, fine) < 0.005


def test_conditions_are_labels_in_turn_and_the_strength():
    network = small()  # of 3 labels
    y, strength = fmd.conditions(network, fmd.Config(guidance_max=3.0, guidance=2.0), 5)
    assert y.tolist() == [0, 1, 2, 0, 1] and strength.tolist() == [2.0]
    assert fmd.conditions(network, fmd.Config(guidance_min=1.5, guidance_max=3.0), 2)[1].tolist() == [1.5]
    assert fmd.conditions(network, fmd.Config(score_labels=False), 5) == (None, None)
    assert fmd.conditions(small(num_classes=0), fmd.Config(), 5) == (None, None)


def test_in_batches_is_the_whole_in_pieces():
    z, y, sizes = torch.randn(10, 2), torch.arange(10), []

    def f(z, y):
        sizes.append(len(z))
        return z if y is None else z + y[:, None]

    assert torch.equal(fmd.in_batches(4, f, z, y), z + y[:, None]) and sizes == [4, 4, 2]
    assert torch.equal(fmd.in_batches(3, f, z), z)
    assert fmd.in_batches(3, lambda z, y: torch.stack([z, z]), z, dim=1).shape == (2, 10, 2)


def test_sliced_w2_of_pictures_sees_each_pixel_by_its_share():
    a = torch.randn(50, 2, 4, 3)
    squares = []
    for pixel in range(24):
        b = a.flatten(1).clone()
        b[:, pixel] += 0.5
        squares.append((fmd.sliced_w2(a, b.view_as(a)) / 0.5) ** 2)
    assert sum(squares) == pytest.approx(1, rel=1e-3)  # directions have length 1
    assert min(squares) > 0.2 / 24 and max(squares) < 3 / 24
    one, other = torch.randn(2, 100, 2)  # a point of the plane is seen by all directions
    assert fmd.sliced_w2(one, other) == fmd.sliced_w2(one[:, :, None, None], other[:, :, None, None])
    # what differs in every pixel by itself, and in no sum of many, is found
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(1000, 1, 16, 16, generator=g), torch.randn(1000, 1, 16, 16, generator=g).sign()
    assert fmd.sliced_w2(a, b) > 1.5 * fmd.sliced_w2(a.flatten(1), b.flatten(1))


def test_search_ranks_noises_by_the_reward_of_their_samples():
    student = small(fmd.FlowMap).float()
    z = torch.randn(20, 2, 1, 1, generator=fmd.generator(4))
    y = torch.arange(20) % 3
    x = student.map(z, torch.ones(20), y).detach()
    order = x[:, 0, 0, 0].argsort(descending=True)
    found = fmd.search_noise(student, fmd.REWARDS["first"], 20, y, generator=fmd.generator(4), keep=3)
    assert torch.equal(found, z[order[:3]])
    one = fmd.search_noise(student, fmd.REWARDS["first"], 20, y[1:2], generator=fmd.generator(4))
    assert torch.equal(one[0], z[student.map(z, torch.ones(20), y[1:2])[:, 0].flatten().argmax()])
    with pytest.raises(ValueError, match="keep 3 of 2"):
        fmd.search_noise(student, fmd.REWARDS["first"], 2, keep=3)


def test_rewards_by_hand():
    x = torch.tensor([[[[1.0, 3.0], [0.0, 0.0]]], [[[2.0, 2.0], [1.0, 1.0]]]])
    assert fmd.REWARDS["first"](x).tolist() == [1.0, 1.5]
    assert fmd.REWARDS["symmetric"](x).tolist() == [-2.0, 0.0]


def test_search_stage(finished, tmp_path, capsys):
    flags = ["--stage", "search", "--student", finished / "student.pt", "--out", tmp_path]
    run(*flags)
    found = json.loads((tmp_path / "search.json").read_text())
    table = found["table"]
    assert [row["evaluations"] for row in table] == [32, 64, 96, 160, 288] and (
        tmp_path / "search.png"
    ).exists()
    assert table[0]["student"] == pytest.approx(table[0]["teacher"], rel=1e-5)  # one draw each, the same
    plain = [row["teacher"] for row in table]
    assert plain == sorted(plain) and plain[-1] > plain[0] + 0.3 and -1 <= found["correlation"] <= 1
    # the student began as the teacher, whose first jump points the right way: search must pay
    assert table[4]["student"] > table[0]["student"] + 0.5 and found["correlation"] > 0.5
    assert "288" in capsys.readouterr().out
    assert "--overwrite" in run(*flags, status=2, capsys=capsys)
    line = run(*flags, "--overwrite", "--reward", "symmetric", status=2, capsys=capsys)  # a point always is
    assert "choose another" in line


def test_pictures_of_pictures_show_what_they_are_given():
    path, other = torch.rand(9, 5, 1, 6, 6) * 2 - 1, torch.rand(9, 5, 1, 6, 6) * 2 - 1
    figure = fmd.plot_filmstrip(path, other, lines=2)
    shown = [axis.images[0].get_array() for axis in figure.axes]
    assert len(shown) == 4 and [axis.get_ylabel() for axis in figure.axes] == ["teacher", "student"] * 2
    for image, (source, line) in zip(shown, ((path, 0), (other, 0), (path, 1), (other, 1))):
        for i in range(9):
            tile = image[1:7, 1 + 7 * i : 7 + 7 * i, 0]
            np.testing.assert_allclose(tile, (source[i, line, 0] + 1) / 2, atol=1e-5)
    assert figure.axes[0].get_xticklabels()[4].get_text() == "δ = 0.50"
    figure = fmd.plot_samples(
        {"teacher": path[:, 0].repeat(3, 1, 1, 1), "student": other[:, 0].repeat(3, 1, 1, 1)}
    )
    assert len(figure.axes) == 6
    np.testing.assert_allclose(
        figure.axes[3].images[0].get_array()[1:7, 1:7, 0], (other[1, 0, 0] + 1) / 2, atol=1e-5
    )
    figure = fmd.plot_guidance(path[:3], other[:3], [1.0, 2.0, 4.0])
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == [f"γ = {s:.1f}" for s in (1, 2, 4)]
    points = torch.randn(2, 3, 7, 2, 1, 1)
    figure = fmd.plot_guidance(points[0], points[1], [1.0, 2.0, 4.0])
    offsets = figure.axes[4].collections[0].get_offsets()
    np.testing.assert_allclose(offsets, points[1, 1].flatten(1), rtol=1e-6)
    animation = fmd.animate_paths(path, other, frames=3)
    animation._func(8)
    last = [axis.images[0].get_array() for axis in animation._fig.axes]
    np.testing.assert_allclose(last[1][1:7, 1:7, 0], (other[8, 0, 0] + 1) / 2, atol=1e-5)
    matplotlib.pyplot.close("all")


def test_pictures_end_to_end(pictures, digits, tmp_path, monkeypatch, capsys):
    expected = (
        "teacher.pt student.pt metrics.json metrics.jsonl comparison.png paths.png error.png losses.png"
    )
    assert {p.name for p in pictures.iterdir()} == {*expected.split(), "paths.gif", "guidance.png"}
    metrics = json.loads((pictures / "metrics.json").read_text())
    assert (
        metrics["config"]["dataset"] == "mnist" and metrics["guidance"] == 2.0 and "coverage" not in metrics
    )
    assert metrics["teacher_nfe"] == 4 * 4 * 2 and metrics["teacher_evaluations"] == 6 * 2 * (6 * 4 + 2)
    # the figures again, from the files
    teacher, student = fmd.load_teacher(pictures / "teacher.pt"), fmd.load_student(pictures / "student.pt")
    z, y = torch.randn(2, 30, 1, 28, 28, generator=fmd.generator(0, fmd.EVALUATION, 1)), torch.arange(30) % 10
    error = fmd.endpoint_error(student, teacher, z[0, :20], y[:20], torch.tensor([2.0]), steps=4)
    assert metrics["endpoint_error"] == pytest.approx(error, rel=1e-3)
    u, two = fmd.guided(teacher, 2.0), torch.tensor([2.0])
    jump, others = student.map(z[0], torch.ones(1), y, two), fmd.solve_ode(u, z[1], 8, "rk4", y)
    assert metrics["sw2"] == pytest.approx(fmd.sliced_w2(jump.detach(), others), rel=1e-3)

    # a teacher's file tells what it is of, and neither distillation nor evaluation looks at data
    def refuse(*args):
        raise AssertionError("touched the data")

    monkeypatch.setattr(fmd.PictureData, "__init__", refuse)
    run("--teacher", pictures / "teacher.pt", "--out", tmp_path / "a", *TINY_PICTURES[2:])
    (tmp_path / "b").mkdir()
    shutil.copy(pictures / "teacher.pt", tmp_path / "b")
    run("--stage", "distill", "--out", tmp_path / "b", *TINY_PICTURES[2:])
    for folder in "ab":
        found, expected = weights(tmp_path / folder / "student.pt"), weights(pictures / "student.pt")
        assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found)
    run("--stage", "evaluate", "--out", pictures, "--overwrite", "--guidance", "1")
    assert json.loads((pictures / "metrics.json").read_text())["guidance"] == 1.0

    # samples: noise from the seed, labels as asked for, ADM's layout
    flags = ["--stage", "sample", "--out", pictures, "--samples", "5", "--seed", "3", "--overwrite"]
    run(*flags, "--classes", "7,2", "--guidance", "4")
    found = np.load(pictures / "samples.npz")
    assert found["arr_0"].shape == (5, 28, 28, 1) and found["arr_0"].dtype == np.uint8
    assert found["arr_1"].tolist() == [7, 2, 7, 2, 7] and found["arr_1"].dtype == np.int64
    z = torch.randn(fmd.SAMPLE_BLOCK, 1, 28, 28, generator=fmd.generator(3, fmd.SAMPLING, 0))[:5]
    x = student.map(z, torch.ones(5), torch.tensor([7, 2, 7, 2, 7]), torch.full((5,), 4.0)).detach()
    expected = torch.floor((127.5 * (x + 1)).clamp(0, 255)).permute(0, 2, 3, 1)
    assert np.abs(found["arr_0"] - expected.numpy()).max() <= 1
    run(*flags)
    assert np.load(pictures / "samples.npz")["arr_1"].tolist() == [0, 1, 2, 3, 4]
    assert "1.0 to 4.0" in run(*flags, "--guidance", "4.5", status=2, capsys=capsys)
    run("--stage", "search", "--out", pictures, "--reward", "symmetric")
    assert json.loads((pictures / "search.json").read_text())["table"][0]["evaluations"] == 64


def test_a_patch_that_does_not_divide_the_picture(digits, tmp_path, capsys):
    flags = [
        "--dataset",
        "mnist",
        "--quick",
        "--patch-size",
        "5",
        "--data",
        digits[0],
        "--out",
        tmp_path / "out",
    ]
    assert "--patch-size 5" in run(*flags, status=2, capsys=capsys) and not (tmp_path / "out").exists()


def test_quick_is_a_preset_that_flags_override(monkeypatch):
    seen = []
    monkeypatch.setattr(fmd, "open_data", lambda config, *rest: seen.append(config) or 1 / 0)
    for flags in (["--dataset", "mnist", "--quick", "--depth", "3"], ["--dataset", "mnist"], ["--quick"]):
        fmd.main(flags)
    quick, full, toy = seen
    assert quick.depth == 3 and quick.hidden_size == fmd.QUICK["mnist"]["hidden_size"] < full.hidden_size
    assert quick.guidance_max == full.guidance_max == 4.0 and quick.correction_interval == (0.0, 0.7)
    assert toy.steps == fmd.QUICK["toy2d"]["steps"] and toy.optimizer == "muon"


# ------------------------------------------------------------------------------------------- pretrained teachers


def public_file(D=128, depth=2, outputs=4, side=4, qk_norm=None, blocks=None, seed=0):
    """Random tensors with the names and shapes of a SiT or REPA file; qk_norm: the size of a head."""
    layers = {
        "t_embedder.mlp.0": (D, 256),
        "t_embedder.mlp.2": (D, D),
        "final_layer.linear": (4 * outputs, D),
    }
    layers |= {"final_layer.adaLN_modulation.1": (2 * D, D), "x_embedder.proj": (D, 4, 2, 2)}
    for i in range(depth):
        name = f"blocks.{i}" if blocks is None or i < blocks else f"decoder_blocks.{i - blocks}"
        layers |= {f"{name}.attn.qkv": (3 * D, D), f"{name}.attn.proj": (D, D), f"{name}.mlp.fc1": (4 * D, D)}
        layers |= {f"{name}.mlp.fc2": (D, 4 * D), f"{name}.adaLN_modulation.1": (6 * D, D)}
        if qk_norm:
            layers |= {f"{name}.attn.{q}_norm": (qk_norm,) for q in "qk"}
    shapes = {"pos_embed": (1, side**2, D), "y_embedder.embedding_table.weight": (1001, D)}
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) / max(1, math.prod(shape[1:])) ** 0.5
        for name, shape in shapes.items()
    }


def relative(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


def check_teacher(path, tensors, depth, heads, velocity, form=""):
    """fmd's teacher of a file against the plain implementation, read in the file's own convention."""
    teacher = fmd.load_teacher(path, form=form)
    w = {k: v.double() for k, v in tensors.items()}
    x, t = noise(2, *teacher.shape), torch.tensor([0.13, 0.94]).double()
    y = torch.tensor([7, 1000])
    expected = velocity(lambda time: plain_dit(w, x, time, y, heads, depth, 2), t)
    with torch.no_grad():
        assert relative(teacher(x.float(), t.float(), y), expected) < 1e-5
    assert teacher.num_classes == 1000 and all(p.dtype == torch.float32 for p in teacher.parameters())


SIT_ARGS = argparse.Namespace(model="SiT-XL/2", path_type="Linear", prediction="velocity", lr=1e-4, ckpt=None)
REPA_ARGS = argparse.Namespace(path_type="linear", prediction="v", qk_norm=True, cfg_prob=0.1)


def test_sit_s2_has_the_velocity_of_a_plain_implementation(tmp_path, capsys):
    tensors = public_file(
        384, 12, outputs=8, side=16
    )  # S/2: time runs the other way, half of the output is unused
    torch.save(tensors, tmp_path / "a.pt")
    check_teacher(tmp_path / "a.pt", tensors, 12, 6, lambda plain, t: plain(1 - t)[:, :4])
    line = capsys.readouterr().out
    assert "SiT, 12 blocks of width 384, 6 heads, patch 2, samples 4 x 32 x 32, 1000 labels" in line


@pytest.mark.parametrize("kind", ["bare", "script", "four channels", "told"])
def test_forms_of_a_sit_file(kind, tmp_path, capsys):
    tensors = public_file(outputs=8 if kind in ("bare", "script") else 4)
    file = {"bare": tensors, "told": tensors}.get(
        kind,
        dict(model=public_file(seed=1), ema=tensors, opt={"state": {}, "param_groups": []}, args=SIT_ARGS),
    )
    torch.save(file, tmp_path / "a.pt")
    form = "sit" if kind == "told" else ""
    check_teacher(tmp_path / "a.pt", tensors, 2, 2, lambda plain, t: plain(1 - t)[:, :4], form)
    assert "2 heads (a guess: width / 64)" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["last", "normalised", "decoder", "script", "told"])
def test_forms_of_a_repa_file(kind, tmp_path, capsys):
    heads = 4 if kind == "normalised" else 2
    settings = dict(qk_norm=32) if kind == "normalised" else dict(qk_norm=64) if kind == "script" else {}
    tensors, depth = public_file(depth=3, **settings), 3
    saved = public_file(depth=3, blocks=2, **settings) if kind == "decoder" else dict(tensors)
    if kind in ("last", "normalised"):
        saved |= {"projectors.0.0.weight": torch.ones(8, 128), "projectors.0.0.bias": torch.ones(8)}
    file = dict(ema={f"module.{k}": v for k, v in saved.items()}, model={}, args=REPA_ARGS, steps=3)
    torch.save(file if kind == "script" else saved, tmp_path / "a.pt")
    form = "repa" if kind == "told" else ""
    check_teacher(tmp_path / "a.pt", tensors, depth, heads, lambda plain, t: -plain(t), form)
    assert "REPA" in capsys.readouterr().out


def public_damage(kind):
    """A file that must be refused, and what the line has to name."""
    tensors = public_file(outputs=8)
    some = "blocks.1.mlp.fc2.weight"
    if kind == "missing":
        return {k: v for k, v in tensors.items() if k != some}, [some]
    if kind == "missing last":
        return {k: v for k, v in tensors.items() if k != "final_layer.linear.weight"}, [
            "final_layer.linear.weight"
        ]
    if kind == "left over":
        return {**tensors, "blocks.1.extra.weight": torch.ones(2)}, ["blocks.1.extra.weight"]
    if kind == "shape":
        return {**tensors, some: torch.ones(5, 5)}, [some]
    if kind == "times":
        return {**tensors, "t_embedder.mlp.0.weight": torch.ones(128, 64)}, ["t_embedder.mlp.0.weight"]
    if kind == "no tensor":
        return {**tensors, some: 3}, [some]
    if kind == "other network":
        return {"layer.weight": torch.ones(2)}, ["not a teacher", "x_embedder.proj.weight"]
    if kind == "silent":
        return public_file(), ["--teacher-format"]
    if kind == "both":
        return {**tensors, "projectors.0.0.weight": torch.ones(2)}, ["both SiT and REPA"]
    args = dict(vars(SIT_ARGS), **{"noise": dict(prediction="noise"), "path": dict(path_type="VP")}[kind])
    return dict(ema=tensors, args=argparse.Namespace(**args)), ["noise" if kind == "noise" else "VP"]


DAMAGES = [
    "missing",
    "missing last",
    "left over",
    "shape",
    "times",
    "no tensor",
    "other network",
    "silent",
    "both",
]


@pytest.mark.parametrize("kind", [*DAMAGES, "noise", "path"])
def test_public_files_that_are_refused(kind, tmp_path, capsys):
    file, hints = public_damage(kind)
    torch.save(file, tmp_path / "a.pt")
    flags = [
        "--dataset",
        "imagenet",
        "--teacher",
        tmp_path / "a.pt",
        "--out",
        tmp_path / "out",
        "--device",
        "cpu",
    ]
    line = run(*flags, status=1, capsys=capsys)
    assert line.startswith("fmd: ") and all(hint in line for hint in [*hints, "a.pt"]), line
    assert not (tmp_path / "out").exists()


def test_released_teachers_are_downloaded_once(tmp_path, monkeypatch, capsys):
    calls = []

    def download(url, path):
        calls.append(url)
        torch.save(public_file(outputs=8), path)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        path = fmd.released("sit-xl/2-256")
        assert (
            fmd.load_teacher(path).num_classes == 1000 and len(calls) == 1 and calls[0].startswith("https://")
        )

    def offline(url, path):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    flags = ["--dataset", "imagenet", "--teacher", "repa-xl/2-256", "--out", tmp_path / "out"]
    line = run(*flags, status=1, capsys=capsys)
    assert "repa-xl/2-256 cannot be downloaded" in line and "go online" in line and "--teacher FILE" in line


# -------------------------------------------------------------------------------------------------------- latents


def write_latents(folder, n=40, side=8, dtype=np.float16, classes=3):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(n, 4, side, side)).astype(dtype), rng.integers(0, classes, n)
    np.save(folder / "latents.npy", x)
    np.save(folder / "latents_labels.npy", y)
    return folder / "latents.npy", x, y


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_latents_are_drawn_as_they_are(dtype, tmp_path, capsys):
    path, x, y = write_latents(tmp_path, dtype=dtype)
    data = fmd.LatentData(path)
    assert "standard deviation 1.0" in capsys.readouterr().out and isinstance(data.x, np.memmap)
    drawn, labels = data.draw(600, fmd.generator(0), 4)
    assert data.shape == (4, 8, 8) and drawn.shape == (600, 4, 8, 8) and drawn.dtype == torch.float32
    assert (
        data.num_classes == 3
    )  # of what is there, so that a student is not asked for labels without pictures
    known = {row.astype(np.float32).tobytes(): label for row, label in zip(x, y)}
    assert [known[row.numpy().tobytes()] for row in drawn] == labels.repeat_interleave(4).tolist()
    assert len({row.numpy().tobytes() for row in drawn}) == 40


@pytest.mark.parametrize(
    "kind", ["shape", "channels", "dtype", "no labels", "range", "number", "float", "nan", "text"]
)
def test_latents_that_are_refused(kind, tmp_path, capsys):
    path, x, y = write_latents(tmp_path)
    beside = tmp_path / "latents_labels.npy"
    if kind == "text":
        path.write_text("no array")
    elif kind == "no labels":
        beside.unlink()
    elif kind in ("range", "number", "float"):
        np.save(beside, {"range": y + 998, "number": y[1:], "float": y.astype(float)}[kind])
    else:
        x = x.astype(np.float64 if kind == "dtype" else np.float32)
        x[3] = np.nan if kind == "nan" else x[3]
        np.save(path, {"shape": x[:, :, 1:], "channels": x[:, :3]}.get(kind, x))
    flags = ["--dataset", "imagenet", "--stage", "teacher", "--latents", path, "--out", tmp_path / "out"]
    line = run(*flags, *TINY_LATENTS, status=1, capsys=capsys)
    hint = dict(text="latents.npy", nan="not finite", shape="N x 4 x S x S", channels="N x 4 x S x S")
    hint |= {"no labels": "latents_labels.npy", "dtype": "float64"}
    assert line.startswith("fmd: ") and hint.get(kind, "0 to 999") in line and not (tmp_path / "out").exists()


TINY_LATENTS = [
    "--hidden-size",
    "16",
    "--depth",
    "1",
    "--num-heads",
    "2",
    "--micro-batch-size",
    "0",
    "--steps",
    "6",
]
TINY_LATENTS += [
    "--batch-size",
    "8",
    "--teacher-batch-size",
    "8",
    "--teacher-steps",
    "4",
    "--eval-samples",
    "20",
]
TINY_LATENTS += ["--eval-paths", "12", "--eval-batch-size", "10", "--solver-steps", "3", "--device", "cpu"]
TINY_LATENTS += ["--log-interval", "1", "--checkpoint-interval", "2", "--warmup", "2"]
TINY_DISTILL = TINY_LATENTS[6:]


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """Stable Diffusion's autoencoder, very small and untrained, and its folder."""
    torch.manual_seed(0)
    sides = ["DownEncoderBlock2D"] * 4, ["UpDecoderBlock2D"] * 4
    settings = dict(block_out_channels=(8,) * 4, norm_num_groups=4, latent_channels=4, layers_per_block=1)
    network = diffusers.AutoencoderKL(down_block_types=sides[0], up_block_types=sides[1], **settings).eval()
    folder = tmp_path_factory.mktemp("vae")
    network.save_pretrained(folder)
    return network, folder


@pytest.fixture
def photos(tmp_path):
    """A folder of folders of PNG files of several shapes."""
    rng = np.random.default_rng(0)
    for name, count in (("cats", 3), ("dogs", 2)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(count):
            picture = PIL.Image.fromarray(rng.integers(0, 256, (40 + 8 * i, 70, 3), dtype=np.uint8))
            picture.save(tmp_path / "photos" / name / f"{i}.png")
    return tmp_path / "photos"


def test_encoding_pictures(vae, photos, tmp_path, monkeypatch, capsys):
    network, folder = vae
    path, flags = tmp_path / "a.npy", ["--vae", folder, "--image-size", 32, "--device", "cpu"]
    command = ["--dataset", "imagenet", "--encode", photos, "--latents", path, *flags]
    run(*command)
    x, y = np.load(path), np.load(tmp_path / "a_labels.npy")
    assert x.shape == (5, 4, 4, 4) and x.dtype == np.float16 and y.tolist() == [0, 0, 0, 1, 1]
    # what diffusers makes of the middle of the picture, and noise of the posterior's size
    picture = PIL.Image.open(photos / "cats" / "0.png")  # 70 x 40
    picture = picture.resize((56, 32), PIL.Image.Resampling.BICUBIC).crop((12, 0, 44, 32))
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        posterior = network.encode(pixels).latent_dist
    n = torch.randn(5, 4, 4, 4, generator=fmd.generator(0, fmd.ENCODING, 0))
    expected = 0.18215 * (posterior.mean[0] + posterior.std[0] * n[0])
    np.testing.assert_allclose(x[0], expected.numpy(), rtol=2e-3, atol=2e-3)
    data = fmd.LatentData(path)
    assert data.shape == (4, 4, 4) and len(data.y) == 5
    # refused, finished, begun anew
    assert "--overwrite" in run(*command, status=2, capsys=capsys)
    before = path.stat().st_mtime_ns
    run(*command, "--resume")
    assert path.stat().st_mtime_ns == before
    run(*command, "--overwrite", "--seed", 1)
    assert not np.array_equal(np.load(path), x)
    assert {p.name for p in tmp_path.iterdir()} == {"photos", "a.npy", "a_labels.npy"}
    (tmp_path / "b.part.txt").write_text("1")
    np.save(tmp_path / "b.part.npy", x[:2])
    line = run(*command[:4], "--latents", tmp_path / "b.npy", *flags, "--resume", status=2, capsys=capsys)
    assert "other pictures" in line
    line = run("--encode", tmp_path / "nothing", "--latents", path, *flags, status=1, capsys=capsys)
    assert "one a class" in line


def test_encoding_goes_on_where_it_stopped(vae, photos, tmp_path):
    network, _ = vae
    shutil.copy(photos / "cats" / "0.png", photos / "dogs" / "1.png")
    fmd.encode(photos, tmp_path / "whole.npy", network, side=32, size=2)
    x = np.load(tmp_path / "whole.npy")
    assert 0.001 < np.abs(x[0] - x[4]).mean() < 1  # one picture, two samples of its posterior
    half, seen = network.encode, []

    def stopping(x):
        seen.append(len(x))
        if len(seen) == 2:
            raise KeyboardInterrupt
        return half(x)

    network.encode = stopping
    with pytest.raises(KeyboardInterrupt):
        fmd.encode(photos, tmp_path / "part.npy", network, side=32, size=2, interval=1)
    with pytest.raises(fmd.UserError, match="begun"):
        fmd.encode(photos, tmp_path / "part.npy", network, side=32, size=2)
    fmd.encode(photos, tmp_path / "part.npy", network, side=32, size=2, resume=True)
    assert seen == [2, 2, 2, 1]  # the first batch is not encoded again
    network.encode = half
    assert np.array_equal(np.load(tmp_path / "whole.npy"), np.load(tmp_path / "part.npy"))


def test_a_picture_that_cannot_be_read_is_one_line(vae, photos, tmp_path, capsys):
    (photos / "dogs" / "0.png").write_bytes(b"not a picture")
    flags = ["--vae", vae[1], "--image-size", 32, "--device", "cpu", "--dataset", "imagenet"]
    line = run("--encode", photos, "--latents", tmp_path / "a.npy", *flags, status=1, capsys=capsys)
    assert "0.png" in line and "--resume" in line and len(line) < 400


def test_what_can_be_missing_for_an_autoencoder(tmp_path, monkeypatch):
    with pytest.raises(fmd.UserError, match="name a folder"):
        fmd.load_vae(str(tmp_path), "cpu")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(fmd.UserError, match="pip install diffusers"):
        fmd.load_vae(str(tmp_path), "cpu")


def test_latents_are_looked_at_through_the_autoencoder(vae):
    network, _ = vae
    x = torch.randn(5, 4, 4, 4)
    with torch.no_grad():
        expected = network.decode(x / 0.18215).sample
    torch.testing.assert_close(fmd.as_pictures(x, network, 2), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(fmd.as_pictures(x), x[:, :3] / 2)
    for x in (torch.randn(5, 1, 4, 4), torch.randn(5, 2, 1, 1)):
        assert fmd.as_pictures(x, network) is x


def test_a_teacher_from_latents_and_its_student(vae, tmp_path, capsys):
    path, _, _ = write_latents(tmp_path)
    assert "--latents" in run("--dataset", "imagenet", "--out", tmp_path / "out", status=2, capsys=capsys)
    run("--dataset", "imagenet", "--latents", path, "--vae", vae[1], "--out", tmp_path / "out", *TINY_LATENTS)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["config"]["precision"] == "bfloat16" and math.isfinite(metrics["endpoint_error"])
    assert fmd.load_student(tmp_path / "out" / "student.pt").shape == (4, 8, 8)
    checkpoint = torch.load(tmp_path / "out" / "student.pt", weights_only=True)
    assert {v.dtype for v in checkpoint["ema"].values()} == {torch.float32}
    run("--out", tmp_path / "out", "--resume", "--steps", "7")  # it knows its latents
    moved = (
        shutil.move(path, tmp_path / "moved.npy"),
        shutil.move(tmp_path / "latents_labels.npy", tmp_path / "moved_labels.npy"),
    )
    assert "latents.npy" in run(
        "--out", tmp_path / "out", "--resume", "--steps", "8", status=1, capsys=capsys
    )
    run("--out", tmp_path / "out", "--resume", "--steps", "8", "--latents", moved[0])


def test_a_public_teacher_is_distilled_without_data_and_sampled(vae, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fmd.LatentData, "__init__", lambda *a: 1 / 0)
    torch.save(public_file(64, 1), tmp_path / "repa.pt")
    out, flags = tmp_path / "out", ["--teacher", tmp_path / "repa.pt", "--teacher-format", "repa"]
    run("--dataset", "imagenet", *flags, "--out", out, *TINY_DISTILL)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["teacher_seconds"] is None and metrics["config"]["hidden_size"] == 64
    assert {"comparison.png", "guidance.png", "paths.gif"} <= {p.name for p in out.iterdir()}
    # at the first step the student is the teacher: F(z, delta) = u(z, 1 - delta)
    student, teacher = (
        fmd.load_student(out / "student.pt"),
        fmd.load_teacher(tmp_path / "repa.pt", form="repa"),
    )
    z, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 999])
    with torch.no_grad():
        change = (student(z, torch.ones(2), y) - teacher(z, torch.ones(2), y)).norm() / teacher(
            z, torch.ones(2)
        ).norm()
    assert 0 < change < 0.3
    run("--out", out, "--resume", "--steps", "7")  # the format comes from the student's own settings
    run("--stage", "evaluate", "--out", out, "--overwrite", "--vae", vae[1], "--device", "cpu")

    # samples: decoded into ADM's layout, labels balanced, resumed block by block
    monkeypatch.setattr(fmd, "SAMPLE_BLOCK", 4)
    flags = [
        "--stage",
        "sample",
        "--out",
        out,
        "--samples",
        "10",
        "--seed",
        "3",
        "--guidance",
        "2",
        "--device",
        "cpu",
    ]
    run(*flags, "--vae", vae[1])
    found = np.load(out / "samples.npz")
    assert found["arr_0"].shape == (10, 64, 64, 3) and found["arr_0"].dtype == np.uint8
    assert found["arr_1"].tolist() == list(range(10)) and not (out / "samples.parts").exists()
    student = fmd.load_student(out / "student.pt")
    z = torch.randn(4, 4, 8, 8, generator=fmd.generator(3, fmd.SAMPLING, 1))
    x = fmd.jump(student, z, torch.arange(4, 8), torch.tensor([2.0]))
    with torch.no_grad():
        x = vae[0].decode(x / 0.18215).sample
    expected = torch.floor((127.5 * (x + 1)).clamp(0, 255)).permute(0, 2, 3, 1).numpy()
    assert np.abs(found["arr_0"][4:8] - expected).max() <= 1
    run(*flags, "--vae", "none", "--overwrite", "--classes", "5,6,7")
    raw = np.load(out / "samples.npz")
    assert raw["arr_0"].shape == (10, 8, 8, 4) and raw["arr_0"].dtype == np.float32
    assert raw["arr_1"].tolist() == [5, 6, 7, 5, 6, 7, 5, 6, 7, 5]
    assert "0 to 999" in run(
        *flags, "--vae", "none", "--overwrite", "--classes", "1000", status=2, capsys=capsys
    )


def test_sampling_goes_on_where_it_stopped(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fmd, "SAMPLE_BLOCK", 10)
    flags = ["--stage", "sample", "--student", finished / "student.pt", "--samples", "35"]
    run(*flags, "--out", tmp_path / "whole")
    jump, calls = fmd.jump, []

    def stopping(student, z, *rest):
        calls.append(len(z))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return jump(student, z, *rest)

    monkeypatch.setattr(fmd, "jump", stopping)
    line = run(*flags, "--out", tmp_path / "part", status=1, capsys=capsys)
    assert "--resume" in line and not (tmp_path / "part" / "samples.npz").exists()
    assert "samples.parts" in run(*flags, "--out", tmp_path / "part", status=2, capsys=capsys)
    line = run(*flags, "--out", tmp_path / "part", "--resume", "--seed", 1, status=2, capsys=capsys)
    assert "other settings" in line
    line = run(*flags, "--out", tmp_path / "part", "--resume", "--score-labels", status=2, capsys=capsys)
    assert "other settings" in line
    write = fmd.write_npz
    monkeypatch.setattr(fmd, "write_npz", lambda *a: 1 / 0)  # stopped when all blocks are there
    run(*flags, "--out", tmp_path / "part", "--resume", status=1)
    monkeypatch.setattr(fmd, "write_npz", write)
    run(*flags, "--out", tmp_path / "part", "--resume")
    assert calls == [10, 10, 10, 10, 5]  # two blocks were kept
    a, b = (np.load(tmp_path / name / "samples.npz") for name in ("whole", "part"))
    assert np.array_equal(a["arr_0"], b["arr_0"]) and len({row.tobytes() for row in a["arr_0"]}) == 35
    before = (tmp_path / "part" / "samples.npz").stat().st_mtime_ns
    run(*flags, "--out", tmp_path / "part", "--resume")
    assert before == (tmp_path / "part" / "samples.npz").stat().st_mtime_ns


# ---------------------------------------------------------------------------------------------------------- scale


def test_a_batch_is_shared_out_whole_and_evenly():
    config = fmd.Config(batch_size=32, group_size=2, guidance_max=3.0)
    batch = fmd.draw_prior((4, 2, 2), 10, config, 3)
    pieces = [fmd.share(batch, i, 4) for i in range(4)]
    for piece in pieces:
        assert len(piece["z"]) == 8 and len(piece["n"]) == 2 and len(piece["delta"]) == 4
        assert len(piece["h"]) == 3 and len(piece["r"]) == 1 and piece["delta"].tolist().count(1.0) == 1
    for name, v in batch.items():  # every row once: z as the rows of its groups, predicting ones first
        rows = torch.cat([piece[name] for piece in pieces]).flatten(1 if v.ndim > 1 else 0)
        assert sorted(map(str, rows.tolist())) == sorted(map(str, v.flatten(1 if v.ndim > 1 else 0).tolist()))
    assert torch.equal(pieces[1]["z"], torch.cat([batch["z"][6:12], batch["z"][26:28]]))
    assert torch.equal(pieces[1]["y"], torch.cat([batch["y"][3:6], batch["y"][13:14]]))
    data = dict(x=torch.arange(6), t=torch.arange(3))
    assert [fmd.share(data, i, 3)["x"].tolist() for i in range(3)] == [[0, 1], [2, 3], [4, 5]]


def test_micro_batches_are_as_few_as_fit_and_alike():
    def count(world=1, **settings):
        return fmd.micro_batches(fmd.Config(**{**dict(batch_size=256), **settings}), world)

    assert count() == 1 and count(micro_batch_size=32) == 8 and count(8, micro_batch_size=32) == 1
    assert count(micro_batch_size=40) == 8  # 7 pieces would not be alike
    assert count(4, micro_batch_size=16) == 4 and count(micro_batch_size=32, group_size=8) == 8
    assert (
        count(2, correction_share=0.0, batch_size=6) == 1
        and count(3, correction_share=1.0, batch_size=6) == 1
    )
    for method in ("meanflow", "regression"):  # which have nothing to split
        assert count(2, method=method, batch_size=6, correction_share=0.5) == 1
    for world, settings, better in (
        (6, {}, 264),
        (1, dict(micro_batch_size=1), None),
        (3, dict(batch_size=4), 12),
    ):
        with pytest.raises(
            fmd.UserError, match=f"--batch-size {better}" if better else "micro-batch-size'"
        ) as e:
            count(world, **settings)
        assert e.value.args[1] == 2
        if better:
            assert count(world, **{**settings, "batch_size": better}) == 1


def distill_some(start, **settings):
    """The gradients of the first step and the weights after three of a distillation."""
    config = fmd.Config(
        batch_size=16, guidance_max=3.0, steps=3, warmup=0, learning_rate=1e-3, alpha=0.7, **settings
    )
    torch.manual_seed(0)
    module = fmd.make_distiller(start, config)
    state = fmd.TrainState(module, config)
    state.fit_to_machine()
    gradients, lambdas = None, []
    for _, figures, _ in fmd.train(
        module, lambda k: fmd.draw_prior(start.shape, 3, config, k), config, state
    ):
        gradients = gradients or {k: p.grad.clone() for k, p in module.named_parameters() if p.requires_grad}
        lambdas.append(figures["lambda"].item())
    return gradients, {k: p.detach().clone() for k, p in module.named_parameters()}, lambdas, figures


def close(a, b, rtol=1e-4):
    for name in a:
        assert relative(a[name], b[name].double()) < rtol or (a[name] - b[name]).abs().max() < 1e-7, name


@pytest.fixture
def latent_start():
    network = small(input_size=4, in_channels=4, patch_size=2).float().requires_grad_(False)
    return network.eval()


@pytest.mark.parametrize("form", ["step", "jvp", "difference"])
@pytest.mark.parametrize("settings", [dict(micro_batch_size=4), dict(activation_checkpointing=True)])
def test_the_way_a_step_is_computed_changes_rounding_only(form, settings, latent_start):
    common = dict(prediction=form, step_count=2, end_share=0.5, ema_target=True)
    whole, found = (
        distill_some(latent_start, **common),
        distill_some(latent_start, **common, **settings),
    )
    close(whole[0], found[0])
    close(whole[1], found[1])
    assert whole[2] == pytest.approx(found[2], rel=1e-4) and whole[2][0] == 0 < whole[2][1]
    for name, value in whole[3].items():
        assert value.item() == pytest.approx(found[3][name].item(), rel=1e-3, abs=1e-9), name


def test_the_balance_is_that_of_the_step_before_over_all_pieces(latent_start):
    config = fmd.Config(batch_size=16, steps=2, micro_batch_size=4, alpha=0.7)
    module, seen = fmd.make_distiller(latent_start, config), []
    inner = module.forward

    def noted(batch):
        seen.append(inner(batch)[1])
        return inner(batch)

    module.forward = noted
    for _ in fmd.train(module, lambda k: fmd.draw_prior(latent_start.shape, 3, config, k), config):
        pass
    first, second = seen[:4], seen[4:]
    G, N = (torch.stack([figures[k] for figures in first]).mean() for k in ("norm_G", "norm_N"))
    for figures in second:
        assert figures["lambda"].item() == pytest.approx((0.7 * G / (N + config.eps)).item(), rel=1e-5)


def test_activation_checkpointing_runs_blocks_again(latent_start):
    calls = []
    network = fmd.DiT.from_teacher(latent_start)
    for block in network.blocks:
        block.attn.register_forward_hook(lambda *_: calls.append(1))
    x, t = torch.randn(2, 4, 4, 4), torch.rand(2)
    for flag, expected in ((False, 2), (True, 4)):
        calls.clear()
        network.activation_checkpointing = flag
        network(x, t).sum().backward()
        assert len(calls) == expected
    calls.clear()
    with torch.no_grad():
        network(x, t)
    assert len(calls) == 2


@pytest.mark.parametrize("form", ["step", "jvp"])
def test_bfloat16_is_near_float32_and_keeps_float32_weights(form, latent_start):
    exact, found = (
        distill_some(latent_start, prediction=form),
        distill_some(latent_start, prediction=form, precision="bfloat16"),
    )
    error = torch.stack([(exact[0][k] - found[0][k]).norm() for k in exact[0]]).norm()
    total = torch.stack([exact[0][k].norm() for k in exact[0]]).norm()
    assert 1e-4 < error / total < 0.05
    with torch.autocast("cpu", torch.bfloat16):
        assert latent_start(torch.randn(2, 4, 4, 4), torch.ones(2)).dtype == torch.float32  # both ends are
    assert all(v.dtype == torch.float32 for v in found[1].values())
    with pytest.raises(fmd.UserError, match="difference"):
        fmd.Config(prediction="difference", precision="bfloat16")


@pytest.mark.skipif(
    not any(shutil.which(c) for c in ("g++", "clang++", "cl")), reason="compiling needs a compiler"
)
@pytest.mark.parametrize("how", [dict(prediction="jvp"), dict(prediction="step", ema_target=True)])
def test_compiled_networks_agree(how, latent_start):
    plain = distill_some(latent_start, **how)
    found = distill_some(latent_start, **how, compile=True)
    close(plain[0], found[0], 1e-3)
    close(plain[1], found[1], 1e-3)


def torchrun(script, *args, processes=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(fmd.__file__).parent)}
    return subprocess.run(
        [*command, str(script), *map(str, args)], capture_output=True, text=True, timeout=300, env=environment
    )


def adam_moments(path):
    """After one step: (1 - beta_1) times the gradients, clipped."""
    return {
        f"{k}": v["exp_avg"]
        for k, v in torch.load(path, weights_only=True)["adamw"]["state"].items()
        if "exp_avg" in v
    }


@pytest.fixture(scope="module")
def parallel(tmp_path_factory):
    """Flags that distill a small public teacher, with guidance, critic and derivative, and a run of them."""
    folder = tmp_path_factory.mktemp("parallel")
    torch.save(public_file(64, 1, outputs=8), folder / "sit.pt")
    flags = ["--dataset", "imagenet", "--teacher", folder / "sit.pt", "--precision", "float32", *TINY_DISTILL]
    flags += ["--batch-size", "16", "--prediction", "jvp"]
    run(*flags, "--out", folder / "one")
    return flags, folder / "one"


def test_two_processes_equal_one(parallel, tmp_path):
    flags, one = parallel
    run(*flags, "--out", tmp_path / "one", "--steps", "1")
    done = torchrun(fmd.__file__, *flags, "--out", tmp_path / "two", "--steps", "1")
    assert done.returncode == 0, done.stderr
    close(adam_moments(tmp_path / "one" / "student.pt"), adam_moments(tmp_path / "two" / "student.pt"))
    assert done.stdout.count("samples 4 x 8 x 8") == 1 and (tmp_path / "two" / "metrics.json").exists()
    # with the average in the targets
    flags_step = [*flags, "--prediction", "step", "--ema-target", "--step-count", "2", "--end-share", "0.5"]
    run(*flags_step, "--out", tmp_path / "step", "--steps", "3")
    done = torchrun(fmd.__file__, *flags_step, "--out", tmp_path / "step two", "--steps", "3")
    assert done.returncode == 0, done.stderr
    close(weights(tmp_path / "step" / "student.pt"), weights(tmp_path / "step two" / "student.pt"), 1e-3)
    # all steps, in two processes and two pieces each
    done = torchrun(fmd.__file__, *flags, "--out", tmp_path / "long", "--micro-batch-size", "4")
    assert done.returncode == 0, done.stderr
    close(weights(one / "student.pt"), weights(tmp_path / "long" / "student.pt"), 1e-3)
    logs = [fmd.read_log(folder / "metrics.jsonl") for folder in (one, tmp_path / "long")]
    assert [line["step"] for line in logs[0]] == [line["step"] for line in logs[1]] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(*logs):
        for name in ("prediction", "correction", "critic", "lambda"):
            assert a[name] == pytest.approx(b[name], rel=1e-2, abs=1e-6), (a["step"], name)


def test_processes_that_cannot_share_a_batch(parallel, tmp_path):
    flags, _ = parallel
    done = torchrun(fmd.__file__, *flags, "--out", tmp_path / "out", processes=3)
    lines = [line for line in done.stderr.splitlines() if line.startswith("fmd:")]
    assert done.returncode and len(lines) == 1 and "--batch-size 16 cannot be dealt evenly to 3" in lines[0]
    assert "--batch-size 24" in lines[0] and not (tmp_path / "out").exists()


def test_a_lost_process_leaves_a_checkpoint_that_goes_on(parallel, tmp_path):
    flags, one = parallel
    script = tmp_path / "lost.py"
    script.write_text(
        "import os, signal, sys, fmd\n"
        "draw = fmd.draw_prior\n"
        "def dying(*args):\n"
        "    if args[-1] == 5 and fmd.rank() == 1:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return draw(*args)\n"
        "fmd.draw_prior = dying\n"
        "sys.exit(fmd.main())\n"
    )
    out = tmp_path / "out"
    done = torchrun(script, *flags, "--out", out)
    assert done.returncode and torch.load(out / "student.pt", weights_only=True)["step"] == 4
    assert (
        "fmd: a process was lost" in done.stderr
        and "--resume" in done.stderr
        and not list(out.glob("*.part.*"))
    )
    run(*flags, "--out", out, "--resume")  # one process goes on where two were
    close(weights(out / "student.pt"), weights(one / "student.pt"), 1e-3)


def test_an_interrupt_stops_all_processes_at_one_step(parallel, tmp_path):
    flags, _ = parallel
    script = tmp_path / "interrupted.py"
    script.write_text(
        "import os, signal, sys, fmd\n"
        "draw = fmd.draw_prior\n"
        "def interrupted(*args):\n"
        "    if args[-1] == 2 and fmd.rank() == 1:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return draw(*args)\n"
        "fmd.draw_prior = interrupted\n"
        "sys.exit(fmd.main())\n"
    )
    done = torchrun(script, *flags, "--out", tmp_path / "out")
    lines = [line for line in done.stderr.splitlines() if line.startswith("fmd:")]
    assert len(lines) == 1 and "step 3 of 6" in lines[0] and "--resume" in lines[0], done.stderr
    assert torch.load(tmp_path / "out" / "student.pt", weights_only=True)["step"] == 3


def test_samples_are_the_same_whatever_the_number_of_processes(finished, tmp_path):
    flags = [
        "--stage",
        "sample",
        "--student",
        finished / "student.pt",
        "--samples",
        "1700",
        "--device",
        "cpu",
    ]
    run(*flags, "--out", tmp_path / "one", "--threads", "1")
    done = torchrun(fmd.__file__, *flags, "--out", tmp_path / "two", "--threads", "1")
    assert done.returncode == 0, done.stderr
    a, b = (np.load(tmp_path / name / "samples.npz") for name in ("one", "two"))
    assert a["arr_0"].shape == (1700, 2) and np.array_equal(a["arr_0"], b["arr_0"])
    assert np.array_equal(a["arr_1"], b["arr_1"]) and done.stdout.count("1700 samples are in") == 1


def test_each_process_draws_its_own_blocks(finished, tmp_path, monkeypatch):
    for name, value in dict(
        rank=lambda: 1, world_size=lambda: 2, wait_for_all=lambda: None, SAMPLE_BLOCK=10
    ).items():
        monkeypatch.setattr(fmd, name, value)
    (tmp_path / "samples.parts").mkdir()
    student = fmd.load_student(finished / "student.pt")
    fmd.write_samples(student, fmd.Config(score_labels=False), tmp_path, 35)
    names = [p.name for p in sorted((tmp_path / "samples.parts").iterdir())]
    assert names == ["000001.npy", "000003.npy"] and len(np.load(tmp_path / "samples.parts" / names[1])) == 5


@pytest.mark.parametrize("form", ["step", "jvp", "difference"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_forwards_needed_are_those_that_a_step_makes(form, guidance, latent_start):
    config = fmd.Config(batch_size=16, prediction=form, guidance_max=guidance, steps=1)
    module, made = fmd.make_distiller(latent_start, config), 0
    for network in (module.network, module.critic, module.teacher):

        def count(_, inputs, __):
            nonlocal made
            made += len(inputs[0])

        network.register_forward_hook(count)
    for _ in fmd.train(module, lambda k: fmd.draw_prior(latent_start.shape, 3, config, k), config):
        pass
    backward = 2 * (16 + 4)  # student and critic
    if form == "jvp":
        made += 12  # the derivative beside the value
    assert sum(fmd.forwards_needed(config).values()) == made + backward
    recomputing = dataclasses.replace(config, activation_checkpointing=True)
    assert sum(fmd.forwards_needed(recomputing).values()) == made + backward + 16 + 4


def test_saved_bytes_of_a_product():
    layer = torch.nn.Linear(3, 5)  # keeps its input; its weights are its own
    assert fmd.saved_bytes(layer, torch.ones(7, 3, requires_grad=True)) == 7 * 3 * 4


def test_benchmark_stage(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(public_file(64, 1, outputs=8), "sit.pt")
    flags = ["--stage", "benchmark", "--batch-size", "8", "--device", "cpu"]
    commands = [
        ["--hidden-size", "16", "--depth", "1", "--group-size", "1"],
        ["--dataset", "imagenet", "--teacher", "sit.pt"],
    ]
    for command, refused in zip(commands, (False, True)):
        run(*flags, *command)
        text = capsys.readouterr().out
        assert text.count("the whole step") == 3 - refused and text.count("samples/s") == 3 - refused
        assert ("drowns in bfloat16" in text) == refused and "M parameters" in text and "TFLOP/s" in text
        needed = {"step": 88, "jvp": 58} if refused else {"step": 86, "jvp": 50, "difference": 50}
        for form, total in needed.items():
            table = text.split(f"--prediction {form}")[1]
            assert int(re.search(r"the whole step\s+\S+\s+\S+\s+(\d+)", table)[1]) == total
    assert not list(tmp_path.glob("runs*"))
    # each part's seconds stand in its own row
    seconds = dict(forward=0.5, student=2.0, prediction=3.0, correction=4.0, update=5.0)
    monkeypatch.setattr(
        fmd, "seconds_of", lambda device, *calls: [seconds.get(call.__name__, 7.0) for call in calls]
    )
    run(*flags, *commands[0])
    text = capsys.readouterr().out
    rows = dict(
        re.findall(r"^(student|prediction|correction|optimizer|noise|the whole step) +(\S+)", text, re.M)
    )
    assert {k: float(v) for k, v in rows.items()} == {
        "student": 2e3,
        "prediction": 3e3,
        "correction": 4e3,
        "optimizer": 5e3,
        "noise": 7e3,
        "the whole step": 7e3,
    }
    assert "1.14 samples/s" in text and " 112.0" in text  # 8 / 7 s, and 7 s in forwards of 0.5 / 8


# ----------------------------------------------------------------------------------------------------- the notebook


NOTEBOOK = Path(__file__).with_name("toy_2d.ipynb")


def text_of(output):
    """What a reader can read of a cell's output."""
    return output.get("text", "") + "".join(
        v for k, v in output.get("data", {}).items() if k in ("text/plain", "text/markdown")
    )


def test_the_notebook_runs_from_top_to_bottom():
    notebook = nbformat.read(NOTEBOOK, 4)
    sizes, few = "TEACHER_STEPS, STEPS = 1000, 400", "TEACHER_STEPS, STEPS = 3, 2"
    small_cell = [c for c in notebook.cells if sizes in c.source]
    assert len(small_cell) == 1 and "SAMPLES = 4000" in small_cell[0].source
    small_cell[0].source = small_cell[0].source.replace(sizes, few).replace("SAMPLES = 4000", "SAMPLES = 200")
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": NOTEBOOK.parent}}).execute()
    pictures = [o for c in notebook.cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) >= 13


def test_the_notebook_is_committed_as_it_ran():
    cells = nbformat.read(NOTEBOOK, 4).cells
    code = [c for c in cells if c.cell_type == "code"]
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
    outputs = [o for c in code for o in c.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    printed = " ".join(map(text_of, outputs))
    source = " ".join(c.source for c in code)
    assert "/" not in re.sub(r" / ", "", printed)  # no path of the machine that ran it
    prose = " ".join(c.source for c in cells if c.cell_type == "markdown")
    prose = re.sub(r"\(http[^)]*\)|arXiv \S+", "", prose)
    known = set(re.findall(r"\d+\.\d+", printed + source))
    assert set(re.findall(r"\d+\.\d+", prose)) <= known  # numbers in its text are printed by its cells
    for number in range(1, 12):
        assert f"\n## {number}. " in "\n" + "\n".join(c.source for c in cells)
    assert not re.search(
        r"^(class|def) \w*(Flow|Teacher|Distill|Network|gradient)", source, re.M
    )  # it imports fmd
