"""ICC profiles made from their definition (ICC.1:2022), to test without files of others."""

import struct

import numpy as np

D50 = (0.9642, 1.0, 0.8249)
# Display P3: DCI-P3's primaries and D65, adapted to D50 (Bradford); columns are red, green and blue in XYZ
P3_TO_XYZ = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
SRGB_TO_XYZ = np.array(
    [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]]
)
CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)  # sRGB's, also Display P3's; type 3


def display_p3() -> bytes:
    tags = {f"{name}XYZ": _xyz(column) for name, column in zip("rgb", P3_TO_XYZ.T, strict=True)}
    tags |= {f"{name}TRC": _curve() for name in "rgb"}
    return _profile("RGB ", "XYZ ", {"wtpt": _xyz(D50), **tags})


def linear_grey() -> bytes:
    """Grey values proportional to light."""
    return _profile("GRAY", "XYZ ", {"wtpt": _xyz(D50), "kTRC": b"curv" + bytes(4) + struct.pack(">I", 0)})


def neutral_cmyk() -> bytes:
    """Ink gives neutral grey, 1 - max(ink): full ink of any color is black."""
    identity = bytes(range(256))
    corners = [(255, 128, 128) if corner == 0 else (0, 128, 128) for corner in range(16)]  # Lab
    matrix = struct.pack(">9i", *(65536 if i % 4 == 0 else 0 for i in range(9)))
    table = b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + matrix + identity * 4
    table += b"".join(map(bytes, corners)) + identity * 3
    return _profile("CMYK", "Lab ", {"wtpt": _xyz(D50), "A2B0": table, "A2B1": table}, kind=b"prtr")


def p3_to_srgb(color: tuple[int, int, int]) -> np.ndarray:
    """The oracle: a Display P3 color in sRGB, in float64, 0 to 255 and clipped."""
    encoded = np.array(color) / 255
    light = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.linalg.inv(SRGB_TO_XYZ) @ P3_TO_XYZ @ light, 0, 1)
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return 255 * srgb


def _xyz(values) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(value * 65536) for value in values))


def _curve() -> bytes:
    return b"para" + bytes(4) + struct.pack(">HH5i", 3, 0, *(round(value * 65536) for value in CURVE))


def _profile(space: str, connection: str, tags: dict[str, bytes], kind: bytes = b"mntr") -> bytes:
    text = b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(4 + 4 + 2 + 1 + 67)
    tags = {"desc": text, "cprt": b"text" + bytes(4) + b"none\0", **tags}
    table, body = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name.encode() + struct.pack(">II", start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    header = bytearray(128)
    header[0:4] = struct.pack(">I", start + len(body))
    header[8:12] = (
        bytes((4, 0x30 if kind == b"mntr" else 0x20, 0, 0)) if kind == b"mntr" else bytes((2, 0x40, 0, 0))
    )
    header[12:16], header[16:20], header[20:24] = kind, space.encode(), connection.encode()
    header[36:40] = b"acsp"
    header[68:80] = struct.pack(">3i", *(round(value * 65536) for value in D50))
    return bytes(header) + table + body
