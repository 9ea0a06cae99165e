"""What a limit means in bytes on this machine. Must not measure anything: the total is given."""

from __future__ import annotations

from trainerd.contract.sizes import compared, parse_bytes

AUTO_SHARE = 0.875
"""14 GB of 16, 3.5 GB of 4: what is left is for the person at the machine."""
ADVICE = "Set it higher, or close other programs."
_OWN = {
    "cpu": ("Python and torch alone need {own} of RAM", "ram_limit"),
    "cuda": ("CUDA's context alone needs {own} on the GPU", "vram_limit"),
}


def no_model_fits(device: str, own_bytes: int, left_bytes: int) -> str:
    """That not even an empty training would fit, and what to do, for the model is not what is too large; "" where one would."""
    if own_bytes < left_bytes:
        return ""
    said, key = _OWN[device]
    return f"No model fits: {said.format(own=f'{own_bytes / 1e6:,.0f} MB')}. Raise the limit (memory.{key}), or free memory."


def ram_left(limit_bytes: int, others_bytes: int, total_bytes: int) -> int:
    """What a limit leaves a training of the RAM beside the others. One that they have passed before bounds nothing but growth, for
    this training could never keep it: then what the machine has left counts. The one rule, for `plan`, `start` and the trainer."""
    left = limit_bytes - others_bytes
    return left if left > 0 else max(0, total_bytes - others_bytes)


def used_already(key: str, limit: str, used_bytes: int, total_bytes: int) -> str:
    """That a limit is below what is in use without the training, which then could never be kept; "" when it is not. Raises ValueError."""
    allowed_bytes = resolve_limit(limit, total_bytes)
    if used_bytes <= allowed_bytes:
        return ""
    used, allowed = compared(used_bytes, allowed_bytes)
    named = f"{key} is {limit} ({allowed})" if limit.strip() == "auto" or limit.strip().endswith("%") else f"{key} is {limit}"
    return f"{named}, and {used} are in use now, without the training: it cannot be kept."


def resolve_limit(text: str, total_bytes: int) -> int:
    """Bytes in "auto" (87.5 % of the total), "80%" or "3.5GB"; never more than there is. Raises ValueError."""
    text = text.strip()
    if text == "auto":
        return int(total_bytes * AUTO_SHARE)
    if text.endswith("%"):
        percent = float(text[:-1])
        if not 0 < percent <= 100:
            raise ValueError(f"{text!r} is not between 0 % and 100 %")
        return int(total_bytes * percent / 100)
    return min(parse_bytes(text), total_bytes)
