"""The text of a kernel as C++: PTX and shared variables become what `emulator.h` has for them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

_NOTHING = "(void)0"
_PTX = {
    "": _NOTHING,
    # mbarriers and bulk copies
    "mbarrier.init.shared::cta.b64 [%0], 1;": "emulator::mbarrier_init(%0)",
    "fence.mbarrier_init.release.cluster;": _NOTHING,
    "mbarrier.inval.shared::cta.b64 [%0];": _NOTHING,
    "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;": "emulator::mbarrier_expect(%0, %1)",
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];": (
        "emulator::bulk_load(%0, %1, %2, %3)"
    ),
    (
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;"
        " selp.u32 %0, 1, 0, p; }"
    ): "%0 = emulator::mbarrier_test(%1, %2)",
    "cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;": (
        "emulator::copy_from_shared(%0, %1, %2)"
    ),
    "cp.async.bulk.commit_group;": _NOTHING,
    "cp.async.bulk.wait_group.read 0;": _NOTHING,
    "cp.async.bulk.wait_group 0;": _NOTHING,
    "fence.proxy.async.shared::cta;": _NOTHING,
    "fence.proxy.async.global;": _NOTHING,
    # copies of 16 bytes
    "cp.async.cg.shared.global [%0], [%1], 16;": "emulator::copy_to_shared(%0, %1, 16)",
    "ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];": "emulator::load_shared_words(%4, %0, %1, %2, %3)",
    "cp.async.commit_group;": _NOTHING,
    "cp.async.wait_group %0;": _NOTHING,
    # words
    "ld.acquire.sys.global.u32 %0, [%1];": "%0 = emulator::load(%1)",
    "ld.acquire.gpu.global.u32 %0, [%1];": "%0 = emulator::load(%1)",
    "ld.relaxed.sys.global.u32 %0, [%1];": "%0 = emulator::load(%1)",
    "ld.relaxed.sys.global.s32 %0, [%1];": "%0 = emulator::load(%1)",
    "ld.relaxed.sys.global.u64 %0, [%1];": "%0 = emulator::load(%1)",
    "ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];": "emulator::load_pair(%2, %0, %1)",
    "ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];": (
        "emulator::load_words(%4, %0, %1, %2, %3)"
    ),
    "ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];": "emulator::load_words(%4, %0, %1, %2, %3)",
    "ld.acquire.cta.shared::cta.u32 %0, [%1];": (
        "%0 = emulator::load(reinterpret_cast<const unsigned*>(emulator::at_shared(%1)))"
    ),
    "st.release.sys.global.u32 [%0], %1;": "emulator::store(%0, %1)",
    "st.release.gpu.global.u32 [%0], %1;": "emulator::store(%0, %1)",
    "st.relaxed.sys.global.u32 [%0], %1;": "emulator::store(%0, %1)",
    "st.relaxed.sys.global.u64 [%0], %1;": "emulator::store(%0, %1)",
    "st.relaxed.sys.global.v2.u64 [%0], {%1, %2};": (
        "emulator::store(%0, %1), emulator::store(%0 + 1, %2)"
    ),
    "st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};": (
        "*reinterpret_cast<uint4*>(emulator::checked_global(%0, 16)) = make_uint4(%1, %2, %3, %4)"
    ),
    "st.release.cta.shared::cta.u32 [%0], %1;": (
        "emulator::store(reinterpret_cast<unsigned*>(emulator::at_shared(%0)), %1)"
    ),
    "red.release.cta.shared::cta.add.u32 [%0], 1;": (
        "emulator::add(reinterpret_cast<unsigned*>(emulator::at_shared(%0)), 1u)"
    ),
    "atom.shared.add.u32 %0, [%1], 1;": (
        "%0 = emulator::add(reinterpret_cast<unsigned*>(emulator::at_shared(%1)), 1u)"
    ),
    "atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;": "%0 = emulator::add(%1, 1u)",
    "atom.relaxed.gpu.global.add.u32 %0, [%1], 1;": "%0 = emulator::add(%1, 1u)",
    "fence.acq_rel.sys;": _NOTHING,
    # barriers, time, launches
    "bar.sync %0, %1;": "emulator::arrive(%0, %1, true)",
    "bar.arrive %0, %1;": "emulator::arrive(%0, %1, false)",
    "mov.u64 %0, %globaltimer;": "%0 = emulator::nanoseconds()",
    "griddepcontrol.launch_dependents;": _NOTHING,
    "griddepcontrol.wait;": _NOTHING,
    # numbers
    "cvt.f32.f16 %0, %1;": "%0 = emulator::widen_half(%1)",
    "cvt.rn.f16.f32 %0, %1;": "%0 = emulator::narrow_half(%1)",
    "{ .reg .f16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }": (
        "%0 = emulator::widen_half(%2 & 0xffffu), %1 = emulator::widen_half(%2 >> 16)"
    ),
    "cvt.rn.bf16x2.f32 %0, %1, %2;": (
        "%0 = emulator::narrow_bfloat16(%2) | emulator::narrow_bfloat16(%1) << 16"
    ),
    "cvt.rn.f16x2.f32 %0, %1, %2;": (
        "%0 = emulator::narrow_half(%2) | emulator::narrow_half(%1) << 16"
    ),
    "cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;": (
        "%0 = emulator::narrow_e4m3(%2) | emulator::narrow_e4m3(%1) << 8"
    ),
    "max.u16x2 %0, %0, %1;": "%0 = emulator::larger_halves(%0, %1)",
    "rcp.approx.ftz.f32 %0, %1;": "%0 = 1.0f / %1",
}
"""PTX that kernels may contain, and the C++ that stands for it."""

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|.', re.DOTALL)
_ASM = re.compile(r"\basm(?: volatile)?\s*\(")
_DYNAMIC = re.compile(r"extern __shared__ __align__\(128\) (\w+) (\w+)\[\];")
_STATIC = re.compile(r"__shared__ (\w+) ([^;]*);")
_OFFSET = re.compile(r"__INTADDR__\(&\(\((\w+)\*\)0\)->(\w+)\)")
_VARIABLE = re.compile(r"(\w+)((?:\[.*\])?)")


def translate(text: str) -> str:
    """C++ for the text of a kernel.

    Raises:
        ValueError: it has PTX that is not modelled.
    """
    text = _OFFSET.sub(r"__builtin_offsetof(\1, \2)", text)
    text = _DYNAMIC.sub(r"\1* const \2 = emulator::dynamic_shared<\1>();", text)
    numbers = itertools.count()

    def references(found: re.Match[str]) -> str:
        lines: list[str] = []
        for variable in found[2].split(","):
            parts = _VARIABLE.fullmatch(variable.strip())
            assert parts is not None, found[0]
            number = next(numbers)
            lines.append(f"using Shared{number} = {found[1]}{parts[2]};")
            lines.append(f"auto& {parts[1]} = emulator::shared<Shared{number}>({number});")
        return " ".join(lines)

    text = _STATIC.sub(references, text)
    done, at = "", 0
    for found in _ASM.finditer(text):
        tokens = list(_inside(text, found.end()))
        end = found.end() + sum(map(len, tokens))
        done += text[at : found.start()] + "(" + _without_ptx(tokens[:-1])
        done += ")" + "\n" * text.count("\n", found.start(), end)
        at = end
    return done + text[at:]


def _inside(text: str, at: int) -> Iterator[str]:
    """Tokens from here to the parenthesis that closes the one before, which is the last one."""
    depth = 1
    while depth:
        found = _TOKEN.match(text, at)
        assert found is not None
        depth += {"(": 1, ")": -1}.get(found[0], 0)
        at = found.end()
        yield found[0]


def _split(tokens: list[str], separator: str) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    depth = 0
    for token in tokens:
        depth += {"(": 1, ")": -1}.get(token, 0)
        if token == separator and depth == 0:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def _without_ptx(tokens: list[str]) -> str:
    """The expression for what stands between the parentheses of an asm statement."""
    code, *sections = _split(tokens, ":")
    ptx = " ".join("".join(token[1:-1] for token in code if token.startswith('"')).split())
    if ptx not in _PTX:
        raise ValueError(f"tests/support/emulator does not know the PTX {ptx!r}")
    operands = [
        "".join(token for token in operand if not token.startswith('"')).strip()
        for section in sections[:2]
        for operand in _split(section, ",")
        if "".join(operand).strip()
    ]
    return re.sub(r"%(\d)", lambda found: operands[int(found[1])], _PTX[ptx])
