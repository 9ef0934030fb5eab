"""Several ranks on one machine's CPU, and an engine of the tests' own that shares a model's tokens.

The engine does what Raylight does: it pads and cuts the tokens before the first block, runs each
block on a slice, attends through yunchang's all-to-alls, and gathers after the last block.
"""

import importlib
import importlib.util
import logging
import os
import subprocess
import sys
import types
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
# no test of several ranks takes as long
SECONDS = 600


def run(program, ranks: int, folder: Path, *args) -> list:
    """Run program(rank, ranks, folder, *args) in as many processes; what each returns, by rank."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{program.__module__}:{program.__qualname__}"
    torch.save(args, folder / "args.pt")
    # ComfyUI has a folder `tests` too
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *_python_path()])}
    command = [sys.executable, "-m", "tests.host.ranks", name, str(ranks), str(folder)]
    started = [
        subprocess.Popen([*command, str(rank)], cwd=ROOT, env=environment) for rank in range(ranks)
    ]
    try:
        codes = [process.wait(timeout=SECONDS) for process in started]
    finally:
        for process in started:
            process.kill()
    assert not any(codes), f"ranks ended with {codes}"
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def _python_path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def main(name: str, ranks: int, folder: Path, rank: int) -> None:
    module, function = name.split(":")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=ranks
    )
    program = getattr(importlib.import_module(module), function)
    args = torch.load(folder / "args.pt", weights_only=False)
    torch.save(program(rank, ranks, folder, *args), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def local_attention(q, k, v, *, softmax_scale=None, **_):
    """An engine's attention of one rank's heads; [B, L, H, D]."""
    heads = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(*heads, scale=softmax_scale)
    return out.transpose(1, 2), None, None


def engine_of(kind: str, rank: int, ranks: int) -> torch.nn.Module:
    """Attention over all ranks: yunchang's, or xfuser's on top of it."""
    from yunchang import LongContextAttention, set_seq_parallel_pg
    from yunchang.kernels import AttnType

    set_seq_parallel_pg(ranks, 1, rank, ranks)
    engine = (_xfuser() if kind == "xfuser" else LongContextAttention)(
        attn_type=AttnType.TORCH_MATH
    )
    engine.ring_attn_fn = local_attention
    return engine


def _xfuser() -> type:
    """xfuser's class without the rest of the package, which needs a GPU and much else."""
    root = Path(importlib.util.find_spec("yunchang").origin).parents[1] / "xfuser"
    for name in ("xfuser", "xfuser.core"):
        stand_in(name, __path__=[str(root.joinpath(*name.split(".")[1:]))])
    stand_in("xfuser.logger", init_logger=logging.getLogger)
    stand_in("xfuser.core.distributed", get_ring_parallel_world_size=lambda: 1,
             get_classifier_free_guidance_world_size=lambda: 1)  # fmt: skip
    # what it imports for its own attention, which the tests replace
    stand_in("xfuser.core.long_ctx_attention.ring", xdit_ring_flash_attn_func=local_attention)
    with _as_with_gpu():
        return importlib.import_module("xfuser.core.long_ctx_attention").xFuserLongContextAttention


@contextmanager
def _as_with_gpu():
    """While xfuser is imported: without a GPU it defines another class."""
    available, torch.cuda.is_available = torch.cuda.is_available, lambda: True
    try:
        yield
    finally:
        torch.cuda.is_available = available


def stand_in(name: str, **members) -> None:
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(members)


def share(model: torch.nn.Module, engine, ranks: int, rank: int) -> None:
    """Let a diffusion model run on its slice of the tokens."""
    import comfy.ldm.flux.math
    import comfy.ldm.wan.model

    for module in (comfy.ldm.flux.math, comfy.ldm.wan.model):
        module.optimized_attention = partial(_attend, engine, module.optimized_attention)
    cut = partial(_cut, ranks=ranks, rank=rank)
    if hasattr(model, "double_blocks"):
        _share_hunyuan(model, cut, ranks)
    else:
        _share_wan(model, cut, ranks)


def _attend(engine, otherwise, q, k, v, heads, *args, skip_reshape=False, **named):
    if q.shape != k.shape:
        # text is whole on every rank
        return otherwise(q, k, v, heads, *args, skip_reshape=skip_reshape, **named)
    if skip_reshape:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    else:
        q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))
    first = () if type(engine).__name__ == "LongContextAttention" else (None,)
    return engine(*first, q.contiguous(), k.contiguous(), v.contiguous()).flatten(2)


def share_by_raylight(model, rank: int, ranks: int, root: Path) -> None:
    """Let a ModelPatcher run as a worker of Raylight's does: its forwards, xfuser's all-to-alls.

    What stays out is what needs a GPU: NCCL, and the kernel of the engine's own attention.

    Args:
        root: a clone of Raylight.
    """
    sys.path.insert(0, str(root / "src"))
    with _as_with_gpu():
        import raylight  # noqa: F401
        import raylight.distributed_modules.attention as attention
        import xfuser.core.distributed as groups
        import yunchang.kernels

    if not groups.model_parallel_is_initialized():
        groups.init_distributed_environment(rank=rank, world_size=ranks)
        groups.initialize_model_parallel(sequence_parallel_degree=ranks, ulysses_degree=ranks)
    attention.set_attn_type(yunchang.kernels.AttnType.TORCH_MATH.name)
    attention.set_sync_ulysses(False)
    engine = attention.xFuserLongContextAttention
    make = engine.__init__

    def with_local_attention(self, *args, **named):
        make(self, *args, **named)
        self.ring_attn_fn = local_attention

    engine.__init__ = with_local_attention
    from raylight.distributed_modules.usp import USPInjectRegistry

    try:
        USPInjectRegistry.inject(model, None, None, None, None)
    finally:
        engine.__init__ = make


def share_guidance(model, rank: int, ranks: int) -> None:
    """Let a ModelPatcher compute one part of the batch, and gather the others' parts."""
    import comfy.patcher_extension

    stand_in(
        "xfuser.core.distributed",
        get_classifier_free_guidance_world_size=lambda: ranks,
        get_classifier_free_guidance_rank=lambda: rank,
    )

    def wrapper(executor, *args, **kwargs):
        rows = len(args[0])
        mine = [x.chunk(ranks)[rank] if torch.is_tensor(x) and len(x) == rows else x for x in args]
        out = executor(*mine, **kwargs)
        parts = [torch.empty_like(out) for _ in range(ranks)]
        dist.all_gather(parts, out.contiguous())
        return torch.cat(parts)

    model.add_wrapper(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, wrapper)


def _cut(x, dim=1, *, ranks, rank):
    missing = -x.shape[dim] % ranks
    if missing:
        shape = list(x.shape)
        shape[dim] = missing
        x = torch.cat([x, x.new_zeros(shape)], dim)
    return x.chunk(ranks, dim)[rank].contiguous()


def _gather(x, length, ranks):
    parts = [torch.empty_like(x) for _ in range(ranks)]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts, 1)[:, :length]


def _share_wan(model, cut, ranks):
    tokens = {}

    def enter(block, args, kwargs):
        x = args[0]
        if block is model.blocks[0]:
            tokens["video"] = x.shape[1]
            x = cut(x)
        return (x, *args[1:]), {**kwargs, "freqs": cut(kwargs["freqs"])}

    def leave(block, args, out):
        return _gather(out, tokens["video"], ranks)

    for block in model.blocks:
        block.register_forward_pre_hook(enter, with_kwargs=True)
    model.blocks[-1].register_forward_hook(leave)


def _share_hunyuan(model, cut, ranks):
    tokens = {}

    def enter_double(block, args, kwargs):
        if block is model.double_blocks[0]:
            tokens.update(txt=kwargs["txt"].shape[1], img=kwargs["img"].shape[1])
            kwargs = {**kwargs, "txt": cut(kwargs["txt"]), "img": cut(kwargs["img"])}
        pe = kwargs["pe"].split([tokens["txt"], tokens["img"]], 2)
        return args, {**kwargs, "pe": torch.cat([cut(part, 2) for part in pe], 2)}

    def leave_double(block, args, out):
        img, txt = out
        return _gather(img, tokens["img"], ranks), _gather(txt, tokens["txt"], ranks)

    def enter_single(block, args, kwargs):
        x = cut(args[0]) if block is model.single_blocks[0] else args[0]
        return (x, *args[1:]), {**kwargs, "pe": cut(kwargs["pe"], 2)}

    def leave_single(block, args, out):
        return _gather(out, sum(tokens.values()), ranks)

    for block in model.double_blocks:
        block.register_forward_pre_hook(enter_double, with_kwargs=True)
    model.double_blocks[-1].register_forward_hook(leave_double)
    for block in model.single_blocks:
        block.register_forward_pre_hook(enter_single, with_kwargs=True)
    if len(model.single_blocks):
        model.single_blocks[-1].register_forward_hook(leave_single)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
