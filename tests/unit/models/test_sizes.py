"""What size a video gets from its image, under both rules that are in use."""

import math
import subprocess
import sys

import pytest

from models import sizes
from models.sizes import Box, Size

AREA_480P, AREA_720P = 480 * 832, 720 * 1280


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ((1920, 1080), (832, 464)),  # 16:9 is a little flatter than 832x480
        ((832, 480), (832, 480)),
        ((1080, 1920), (464, 832)),
        ((1024, 1024), (624, 624)),
        ((1600, 1200), (720, 544)),
        ((1200, 1800), (512, 768)),
        ((3000, 1000), (1088, 352)),
        ((1, 1), (624, 624)),
        ((5, 7), (528, 736)),
    ],
)
def test_keep_area_at_480p(image, expected):
    assert sizes.for_image("keep_area", Size(*image), target_area=AREA_480P) == Size(*expected)


@pytest.mark.parametrize(
    ("image", "expected"),
    [((1920, 1080), (1280, 720)), ((1000, 1000), (960, 960)), ((832, 480), (1248, 720))],
)
def test_keep_area_at_720p(image, expected):
    assert sizes.for_image("keep_area", Size(*image), target_area=AREA_720P) == Size(*expected)


def official_keep_area(width, height, target_area):
    """round(sqrt(area * aspect) // 8 // 2 * 2) cells of 8 pixels, in floating point."""
    aspect = height / width
    rows, columns = math.sqrt(target_area * aspect), math.sqrt(target_area / aspect)
    return Size(*(8 * round(side // 8 // 2 * 2) for side in (columns, rows)))


def test_keep_area_is_the_official_formula():
    for width in range(37, 2000, 61):
        for height in range(41, 2000, 67):
            size = sizes.keep_area(Size(width, height), AREA_480P)
            assert size == official_keep_area(width, height, AREA_480P)
            assert size.width % 16 == size.height % 16 == 0
            assert size.area <= AREA_480P


def test_an_image_of_exactly_the_target_size_keeps_it():
    """The official formula loses 16 rows here, by rounding."""
    assert official_keep_area(832, 480, AREA_480P) == Size(832, 464)
    for size in (Size(832, 480), Size(480, 832), Size(1280, 720), Size(720, 1280), Size(960, 544)):
        assert sizes.keep_area(size, size.area) == size


@pytest.mark.parametrize(
    ("image", "at_480p", "at_540p", "at_720p"),
    [
        ((1920, 1080), (832, 480), (960, 544), (1280, 720)),
        ((1080, 1920), (480, 832), (544, 960), (720, 1280)),
        ((512, 512), (480, 480), (576, 576), (960, 960)),
        ((4000, 100), (832, 480), (960, 544), (1280, 720)),
    ],
)
def test_adaptive_sizes(image, at_480p, at_540p, at_720p):
    found = [sizes.adaptive(Size(*image), name) for name in ("480p", "540p", "720p")]
    assert found == [Size(*at_480p), Size(*at_540p), Size(*at_720p)]


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ((1000, 833), (832, 480)),
        ((1000, 834), (480, 480)),
        ((1000, 1249), (480, 480)),
        ((1000, 1250), (480, 832)),  # 1.25 lies between square and portrait: portrait comes first
        ((1000, 1251), (480, 832)),
    ],
)
def test_the_edges_between_buckets(image, expected):
    assert sizes.for_image("adaptive", Size(*image), target_area=AREA_480P) == Size(*expected)


@pytest.mark.parametrize(
    ("area", "name"),
    [(AREA_480P, "480p"), (544 * 960, "540p"), (AREA_720P, "720p"), (1, "480p"), (10**9, "720p")],
)
def test_the_presets_area_names_the_resolution(area, name):
    assert sizes.resolution_of(area) == name


@pytest.mark.parametrize(
    ("image", "shape", "box"),
    [
        ((1000, 1000), (480, 480), (0, 0, 1000, 1000)),
        ((1920, 1080), (832, 480), (24, 0, 1896, 1080)),
        ((1900, 1096), (832, 480), (0, 0, 1900, 1096)),  # 0.5768 against 0.5769: stretched
        ((1080, 1920), (480, 832), (0, 24, 1080, 1896)),
        ((601, 1001), (480, 480), (0, 200, 601, 801)),
        ((1, 100), (832, 480), (0, 49, 1, 50)),
    ],
)
def test_the_middle_is_kept(image, shape, box):
    assert sizes.crop(Size(*image), Size(*shape)) == Box(*box)


@pytest.mark.parametrize("rule", sizes.SIZE_RULES)
def test_every_rule_gives_whole_tokens(rule):
    for width, height in [(3, 5), (640, 333), (333, 640), (77, 77)]:
        size = sizes.for_image(rule, Size(width, height), target_area=AREA_480P)
        assert size.width % 16 == size.height % 16 == 0


def test_what_has_no_size_is_refused():
    with pytest.raises(ValueError, match="one of keep_area, adaptive, got 'stretch'"):
        sizes.for_image("stretch", Size(4, 4), target_area=AREA_480P)
    with pytest.raises(ValueError, match="at least one pixel, got 0x4"):
        sizes.for_image("adaptive", Size(0, 4), target_area=AREA_480P)
    with pytest.raises(ValueError, match="5000x1 is too narrow"):
        sizes.for_image("keep_area", Size(5000, 1), target_area=AREA_480P)


def test_sizes_need_only_the_standard_library():
    code = (
        "import sys; before = set(sys.modules); from models import sizes;"
        "new = {name.split('.')[0] for name in set(sys.modules) - before};"
        "sys.exit(str(new - sys.stdlib_module_names - {'models'}) if"
        " new - sys.stdlib_module_names - {'models'} else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
