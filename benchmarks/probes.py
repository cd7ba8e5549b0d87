"""What the probes of the load find of torchvision's classifiers and of each family of timm.

    .venv/bin/python benchmarks/probes.py --out probes.json

Each model with random weights, in a process of its own whose memory and time are bounded, one
thread. What is finished stands in the JSON file; a second run resumes there. At the end the columns
`probes` and `transform` and the table of timm in docs/reference/compiled-models.md are replaced;
the ratios of `compiled_models.py` on that page stay.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import torch
import torchvision
from models_page import PAGE, with_probes
from timm.models._registry import _module_to_models
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from service.models import loading
from service.models.catalog import ModelSpec
from service.models.loaded import LoadedModel

BACKWARD = 1.5
"""How many forward passes a walk back through the graph counts as."""

FAMILIES = (
    "xcit_nano_12_p8_224.fb_in1k",
    "crossvit_tiny_240.in1k",
    "cait_xxs24_224.fb_dist_in1k",
    "convit_tiny.fb_in1k",
    "twins_svt_small.in1k",
    "twins_pcpvt_small.in1k",
    "swin_tiny_patch4_window7_224.ms_in1k",
    "hiera_tiny_224.mae_in1k_ft_in1k",
    "vit_small_patch16_rope_224.naver_in1k",
    "nest_tiny_jx.goog_in1k",
    "mvitv2_tiny.fb_in1k",
    "levit_128s.fb_dist_in1k",
    "pit_ti_224.in1k",
    "coat_tiny.in1k",
    "visformer_tiny.in1k",
    "volo_d1_224.sail_in1k",
    "mixer_b16_224.goog_in21k_ft_in1k",
    "resmlp_12_224.fb_in1k",
    "gmlp_s16_224.ra3_in1k",
    "fastvit_t8.apple_in1k",
    "nextvit_small.bd_in1k",
    "efficientformer_l1.snap_dist_in1k",
    "efficientformerv2_s0.snap_dist_in1k",
    "tiny_vit_5m_224.in1k",
    "davit_tiny.msft_in1k",
    "gcvit_xxtiny.in1k",
    "maxvit_nano_rw_256.sw_in1k",
    "coatnet_nano_rw_224.sw_in1k",
    "edgenext_xx_small.in1k",
    "mobilevit_xxs.cvnets_in1k",
    "mobilevitv2_050.cvnets_in1k",
    "poolformer_s12.sail_in1k",
    "caformer_s18.sail_in1k",
    "convnext_atto.d2_in1k",
    "convnextv2_atto.fcmae_ft_in1k",
    "hiera_small_abswin_256.sbb2_e200_in12k_ft_in1k",
    "eva02_tiny_patch14_336.mim_in22k_ft_in1k",
    "tnt_s_legacy_patch16_224.in1k",
    "swinv2_tiny_window8_256.ms_in1k",
    "swinv2_cr_tiny_ns_224.sw_in1k",
    "focalnet_tiny_srf.ms_in1k",
    "pvt_v2_b0.in1k",
    "sequencer2d_s.in1k",
    "deit_tiny_distilled_patch16_224.fb_in1k",
    "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
    "vit_little_patch16_reg4_gap_256.sbb_in1k",
    "vit_tiny_r_s16_p8_224.augreg_in21k_ft_in1k",
    "vit_srelpos_small_patch16_224.sw_in1k",
    "beit_base_patch16_224.in22k_ft_in22k_in1k",
    "vitamin_small_224.datacomp1b_clip",
    "naflexvit_base_patch16_gap.e300_s576_in1k",
    "flexivit_small.300ep_in1k",
    "maxxvitv2_nano_rw_256.sw_in1k",
    "swiftformer_xs.dist_in1k",
    "efficientvim_m1.e300_in1k",
    "efficientvit_b0.r224_in1k",
    "efficientvit_m0.r224_in1k",
    "repvit_m1.dist_in1k",
    "shvit_s1.in1k",
    "mambaout_femto.in1k",
    "iformer_t.in1k",
    "lowformer_b0.in1k",
    "cpubone_nano.r224_in1k",
    "csatv2.r512_in1k",
    "inception_next_atto.sail_in1k",
    "convmixer_768_32.in1k",
    "haloregnetz_b.ra3_in1k",
    "mobileone_s1.apple_in1k",
    "resnext26ts.ra2_in1k",
    "starnet_s1.in1k",
    "rdnet_tiny.nv_in1k",
    "fasternet_t0.in1k",
    "cs3darknet_focus_s.ra4_e3600_r256_in1k",
    "cspnext_tiny.rsb_a1_in1k",
    "densenet121.ra_in1k",
    "dla46x_c.in1k",
    "dpn68.mx_in1k",
    "tinynet_e.in1k",
    "ghostnet_100.in1k",
    "hardcorenas_b.miil_green_in1k",
    "hgnetv2_b0.ssld_stage2_ft_in1k",
    "hrnet_w18_small.ms_in1k",
    "lcnetv2_small.paddle_in1k",
    "legacy_seresnet18.in1k",
    "mobilenetv3_small_050.lamb_in1k",
    "nf_regnet_b1.ra2_in1k",
    "regnetx_004_tv.tv2_in1k",
    "repghostnet_050.in1k",
    "res2net50_14w_8s.in1k",
    "resnest14d.gluon_in1k",
    "resnet10t.c3_in1k",
    "resnetv2_18.ra4_e3600_r224_in1k",
    "rexnet_100.nav_in1k",
    "selecsls60.in1k",
    "skresnet18.ra_in1k",
    "ese_vovnet19b_dw.ra_in1k",
    "tresnet_m.miil_in1k",
    "xception41p.ra3_in1k",
    "legacy_xception.tf_in1k",
    "inception_v3.tf_in1k",
    "inception_v4.tf_in1k",
    "inception_resnet_v2.tf_in1k",
    "vgg11.tv_in1k",
    "nasnetalarge.tf_in1k",
    "pnasnet5large.tf_in1k",
)
"""A small pretrained configuration of each module of timm that has one."""


def main() -> int:
    """Measure every model that is not measured yet, then write the page."""
    options = _options()
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)  # the children are forked: nothing may have started threads
    done: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    for builder in options.models or [*(f"timm/{name}" for name in FAMILIES), *_torchvision()]:
        if builder not in done:
            done[builder] = _in_a_process(builder, options)
            options.out.write_text(json.dumps(done, indent=1))
            print(builder, json.dumps(done[builder]), flush=True)
    if not options.models:
        PAGE.write_text(with_probes(PAGE.read_text(), done, timm.__version__, _left_out()))
    return 0


def _torchvision() -> list[str]:
    """Every classifier, the small ones first."""
    names = sorted(
        torchvision.models.list_models(torchvision.models),
        key=lambda name: torchvision.models.get_model_weights(name)["DEFAULT"].meta["num_params"],
    )
    return [f"torchvision/{name}" for name in names]


def _left_out() -> list[str]:
    """The modules of timm that FAMILIES leaves out: none has a pretrained classifier."""
    tried = {name.partition(".")[0] for name in FAMILIES}
    return sorted(family for family, names in _module_to_models.items() if not names & tried)


def _in_a_process(builder: str, options: argparse.Namespace) -> dict[str, Any]:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(there, builder, options.memory))
    child.start()
    there.close()
    try:
        found: dict[str, Any] = (
            here.recv()
            if here.poll(options.seconds)
            else {"skipped": f"not finished after {options.seconds} s"}
        )
    except EOFError:
        found = {"skipped": f"its process ended, with {options.memory} GB to use"}
    child.kill()
    child.join()
    return found


def _send(there: Connection, builder: str, memory: float) -> None:
    bound = int(memory * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (bound, bound))
    try:
        there.send(_measure(builder))
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error) and not isinstance(error, MemoryError):
            raise
        there.send({"skipped": f"it needs more than {memory} GB"})
    except Exception as error:  # noqa: BLE001 - a refusal is a result
        there.send({"refused": f"{type(error).__name__}: {error}"})


def _measure(builder: str) -> dict[str, Any]:
    spec = ModelSpec("m", builder)
    with _counting() as cost:
        model = loading.load_model(spec, allow_random_weights=True)
    return cost | {
        "layer": model.target_layer,
        "grid": _grid(model),
        "mappable": sum(layer.target for layer in model.layers),
        "probes": [found.name for found in model.findings if not found.passed],
        "said": [found.result for found in model.findings if not found.passed],
        "no_gradients": model.no_gradients,
        "transform": _transform(model),
    }


def _grid(model: LoadedModel) -> list[int] | None:
    layouts = [layer.layout for layer in model.layers if layer.path == model.target_layer]
    return list(layouts[0].grid) if layouts and layouts[0] else None


def _transform(model: LoadedModel) -> str:
    return str(model.preprocessing).partition(", mean")[0]


@contextmanager
def _counting() -> Iterator[dict[str, Any]]:
    """Inside, what the probes of a load cost: counted at the calls of the module and of autograd.

    Of one image each; a walk back counts `BACKWARD`. `forward`: seconds of one forward pass.
    """
    cost: dict[str, Any] = {"forwards": 0.0}
    probes, grad = loading._measured, torch.autograd.grad  # noqa: SLF001 - wrapped, not changed

    def count(module: nn.Module, args: tuple[Any, ...]) -> None:
        if getattr(module, "_is_counted", False):  # replicas have it from the master
            cost["forwards"] += len(args[0])

    def walk(*args: Any, is_grads_batched: bool = False, **more: Any) -> Any:
        rows = len(args[2]) if is_grads_batched else 1
        cost["forwards"] += BACKWARD * rows
        return grad(*args, is_grads_batched=is_grads_batched, **more)

    def counted(model: LoadedModel, built: Any, images: torch.Tensor) -> LoadedModel:
        with torch.no_grad():
            model.replicate()(images[:1])  # what the first one sets up is no part of it
            started = time.perf_counter()
            model.replicate()(images[:1])
        cost["forward"] = time.perf_counter() - started
        model.module.__dict__["_is_counted"] = True
        hook = register_module_forward_pre_hook(count)
        started = time.perf_counter()
        with mock.patch.object(torch.autograd, "grad", walk):
            found = probes(model, built, images)
        cost["seconds"] = time.perf_counter() - started
        hook.remove()
        del model.module.__dict__["_is_counted"]
        return found

    with (
        mock.patch.object(loading, "_measured", counted),
        mock.patch.object(loading, "_tuned", lambda model, *_: model),  # faster forms: not needed
    ):
        yield cost


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("probes.json"), help="results, model by model")
    add("--models", nargs="+", help="these builders alone, and no page")
    add("--memory", type=float, default=4.0, help="GB that the process of a model may use")
    add("--seconds", type=int, default=300, help="how long a model may take")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
