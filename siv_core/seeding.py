"""All randomness: named streams, each seeded by a fixed mix of integers, so that no state has to be stored.

A step's noise depends on (seed, stream, step) and on nothing else: not on what ran before, on the rank, or on how a batch
is cut into micro-batches. torch's CPU generator ignores the upper 32 bits of a seed, hence the 32-bit mix.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_MASK = 0xFFFFFFFF


def mix32(*words: int) -> int:
    """A 32-bit integer from any number of non-negative integers, each taken as two 32-bit halves (MurmurHash3's mixing)."""
    h = 0x9747B28C
    for word in words:
        for half in (word & _MASK, (word >> 32) & _MASK):
            k = (half * 0xCC9E2D51) & _MASK
            k = ((k << 15 | k >> 17) * 0x1B873593) & _MASK
            h ^= k
            h = ((h << 13 | h >> 19) * 5 + 0xE6546B64) & _MASK
    h ^= 8 * len(words)
    h = ((h ^ h >> 16) * 0x85EBCA6B) & _MASK
    h = ((h ^ h >> 13) * 0xC2B2AE35) & _MASK
    return h ^ h >> 16


def stream_seed(seed: int, stream: str, step: int = 0) -> int:
    """The 32-bit seed of one stream at one step."""
    return mix32(seed, zlib.crc32(stream.encode()), step)


class Streams:
    """Generators of one step: `streams("prior")` starts afresh at each call with the same name."""

    def __init__(self, seed: int, step: int, device: torch.device | str = "cpu") -> None:
        self.seed, self.step, self.device = seed, step, torch.device(device)

    def __call__(self, stream: str) -> torch.Generator:
        generator = torch.Generator(self.device)
        generator.manual_seed(stream_seed(self.seed, stream, self.step))
        return generator


def normal(n: int, dim: int, generator: torch.Generator) -> Tensor:
    """Standard normal noise [n, dim] on the generator's device."""
    return torch.randn(n, dim, generator=generator, device=generator.device)


class DataOrder:
    """One endless sequence of seeded permutations of `size` rows, without short batches: an epoch is `size` images of it."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.int64)

    def take(self, start: int, count: int) -> Tensor:
        """Row numbers [count] (int64, CPU) of the images `start … start + count − 1` of the sequence."""
        parts = []
        while count > 0:
            epoch, offset = divmod(start, self.size)
            if epoch != self._epoch:
                generator = Streams(self.seed, epoch)("order")
                self._epoch, self._permutation = epoch, torch.randperm(self.size, generator=generator)
            part = self._permutation[offset : offset + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return torch.cat(parts)


class Seeded(TorchDispatchMode):
    """While it is entered, whatever draws random numbers in this thread draws them from a generator of its own.

    torch's initialisation of layers knows the global generators alone, which all threads share: weights would depend on what
    other threads do. The bits are those that the global generator would give with this seed; it is left as it was.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seed, self.generators = seed, dict[torch.device, torch.Generator]()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled meanwhile, and to be told so torch would import its compiler for two seconds

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self.generators:
            self.generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self.generators[device]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags or _given(func, args, kwargs) is not None:
            return func(*args, **kwargs)
        device = next((x.device for x in args if isinstance(x, Tensor)), torch.device(kwargs.get("device") or "cpu"))
        if device.type == "meta":
            return func(*args, **kwargs)
        named = func if _takes_generator(func) else _with_generator(func)
        if named is None:
            reason = "takes no generator: what it draws would depend on other threads; draw it another way"
            raise NotImplementedError(f"{func} {reason}")
        return named(*args, **{**kwargs, "generator": self._generator(device)})


def _takes_generator(func: Any) -> bool:
    return any(argument.name == "generator" for argument in func._schema.arguments)


def _given(func: Any, args: Any, kwargs: Any) -> Any:
    """The generator of a call, None where it has none."""
    if "generator" in kwargs:
        return kwargs["generator"]
    places = [i for i, argument in enumerate(func._schema.arguments) if argument.name == "generator" and not argument.kwarg_only]
    return next((args[i] for i in places if i < len(args)), None)


def _with_generator(func: Any) -> Any:
    """torch.rand without a generator is another function of torch than with one."""
    name = {"default": "generator"}.get(func._overloadname, f"{func._overloadname}_generator")
    return getattr(func.overloadpacket, name, None)
