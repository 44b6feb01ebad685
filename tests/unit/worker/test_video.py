"""Frames become exactly the mp4 that was asked for, or an error that names the reason."""

import contextlib
import gc
import os
import resource
import signal
import subprocess
import sys
import tempfile
import textwrap
import time

import imageio_ffmpeg
import psutil
import pytest
import torch

from jobs import errors as jobs_errors
from worker import errors, h264, settings, video


@pytest.fixture
def encode(tmp_path, worker_settings):
    def run(frames_THWC, *, fps=16, path=None, chunk=4):
        path = path or tmp_path / "video.mp4"
        height, width = frames_THWC.shape[1:3]
        with video.Mp4Writer(
            path, width=width, height=height, fps=fps, worker_settings=worker_settings
        ) as writer:
            for frames in frames_THWC.split(chunk):
                writer.write(frames)
            writer.finish()
        return path

    return run


@pytest.fixture
def ffmpeg_that(tmp_path, monkeypatch):
    """`ffmpeg_that("words.remove('-an')")`: lines of Python go before the real one."""

    def put(lines):
        real = imageio_ffmpeg.get_ffmpeg_exe()
        program = tmp_path / "ffmpeg"
        program.write_text(
            f"#!{sys.executable} -SE\nimport os, subprocess, sys, time\nwords = sys.argv[1:]\n"
            f"real = [{real!r}]\n{textwrap.dedent(lines)}\nos.execv(*real, ['ffmpeg', *words])\n"
        )
        program.chmod(0o755)
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(program))

    return put


@pytest.fixture
def no_leaks():
    """No process and no file handle is left of what the test started."""
    process = psutil.Process()
    gc.collect()  # what earlier tests left does not go meanwhile
    before = (process.children(), process.num_fds())
    yield
    assert (process.children(), process.num_fds()) == before


def noise(num_frames, height, width):
    generator = torch.Generator().manual_seed(0)
    shape = (num_frames, height, width, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(
    ("num_frames", "height", "width", "fps"),
    [(1, 16, 16, 16), (5, 16, 16, 1), (17, 48, 80, 24), (9, 80, 48, 60), (81, 64, 64, 16)],
)
def test_the_file_has_the_size_count_and_rate_of_its_frames(encode, num_frames, height, width, fps):
    path = encode(noise(num_frames, height, width), fps=fps)
    assert video.probe(path) == video.VideoInfo(
        width=width,
        height=height,
        num_frames=num_frames,
        fps=float(fps),
        codec="h264",
        pixel_format="yuv420p",
    )


def test_a_player_can_start_before_the_end_has_arrived(encode):
    data = encode(noise(9, 32, 32)).read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize(
    "rgb", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (128, 128, 128), (0, 0, 0), (255, 255, 255)]
)
@pytest.mark.parametrize("size", [(64, 64), (720, 1280)], ids=["small", "hd"])
def test_a_colour_survives_by_the_tags_of_the_file(encode, rgb, size):
    """Decoded as the file says it should be; BT.601 for BT.709 would shift green by some 30."""
    frames = torch.tensor(rgb, dtype=torch.uint8).expand(1, *size, 3).contiguous()
    path = encode(frames)
    decoded = subprocess.run(
        [
            *(imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-i", path),
            *("-f", "rawvideo", "-pix_fmt", "rgb24", "-"),
        ],
        capture_output=True,
        check=True,
    ).stdout
    pixel = torch.frombuffer(bytearray(decoded), dtype=torch.uint8).view(-1, 3)[0]
    assert (pixel.int() - torch.tensor(rgb)).abs().max() <= 3


def test_the_file_is_tagged_as_bt709_of_limited_range(encode):
    path = encode(noise(1, 64, 64))
    told = subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-i", path],
        capture_output=True,
        check=False,
        text=True,
    ).stderr
    assert "yuv420p(tv, bt709, " in told
    assert b"colr" in path.read_bytes()


def test_few_cores_make_the_same_bytes_as_many(encode, tmp_path):
    cores = os.sched_getaffinity(0)
    if len(cores) == 1:
        pytest.skip("there is one core")
    many = encode(noise(9, 64, 96), path=tmp_path / "many.mp4")
    os.sched_setaffinity(0, {min(cores)})
    try:
        one = encode(noise(9, 64, 96), path=tmp_path / "one.mp4")
    finally:
        os.sched_setaffinity(0, cores)
    assert one.read_bytes() == many.read_bytes()


def test_an_older_processor_makes_the_same_bytes(tmp_path, worker_settings, ffmpeg_that):
    """x264 rounds otherwise in its code for newer ones, where that is not forbidden."""
    medium = worker_settings.model_copy(update={"x264_preset": "medium"})  # as ultrafast needs none
    files = [tmp_path / name for name in ("newest.mp4", "old.mp4")]
    for path in files:
        with video.Mp4Writer(path, width=256, height=160, fps=16, worker_settings=medium) as writer:
            writer.write(noise(25, 160, 256))
            writer.finish()
        ffmpeg_that("words[words.index('-x264-params') + 1] += ':asm=sse2'")
    assert files[0].read_bytes() == files[1].read_bytes()


def truncated(data):
    return data[: -len(data) // 4]


def zeroed_in_the_middle(data):
    middle = len(data) // 2
    return data[:middle] + bytes(200) + data[middle + 200 :]


@pytest.mark.parametrize(
    "damage", [truncated, zeroed_in_the_middle, lambda _: b"", lambda _: b"no video " * 999]
)
def test_a_damaged_file_is_refused(encode, damage):
    path = encode(noise(33, 64, 96))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(errors.EncodingFailed, match=r"video\.mp4 cannot be decoded"):
        video.probe(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(errors.EncodingFailed, match="No such file"):
        video.probe(tmp_path / "video.mp4")


def test_a_sound_without_pictures_is_refused(tmp_path):
    path = tmp_path / "sound.mp4"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-f", "lavfi"]
    subprocess.run([*command, "-i", "sine=d=0.2", path], check=True)
    with pytest.raises(errors.EncodingFailed, match="cannot be decoded"):
        video.probe(path)


@pytest.mark.parametrize(
    "asked", [{"num_frames": 8}, {"num_frames": 10}, {"fps": 24}, {"width": 64}, {"height": 16}]
)
def test_another_video_than_asked_for_is_refused(encode, asked):
    path = encode(noise(9, 32, 32), fps=16)
    right = {"num_frames": 9, "fps": 16, "width": 32, "height": 32}
    assert video.check(path, **right).num_frames == 9
    with pytest.raises(errors.EncodingFailed, match="num_frames=9"):
        video.check(path, **right | asked)


@pytest.fixture
def writer(tmp_path, worker_settings):
    with video.Mp4Writer(
        tmp_path / "video.mp4", width=512, height=512, fps=8, worker_settings=worker_settings
    ) as opened:
        yield opened


def kill_ffmpeg():
    (ffmpeg,) = [one for one in psutil.Process().children() if "ffmpeg" in one.name()]
    ffmpeg.send_signal(signal.SIGKILL)


@pytest.mark.usefixtures("no_leaks")
def test_an_ffmpeg_that_dies_among_the_frames_is_an_encoding_failure(writer):
    writer.write(noise(2, 512, 512))
    kill_ffmpeg()
    many = noise(100, 512, 512)
    with pytest.raises(errors.EncodingFailed, match="ffmpeg ended with -9"):
        writer.write(many)


@pytest.mark.usefixtures("no_leaks")
def test_an_ffmpeg_that_dies_after_the_last_frame_is_an_encoding_failure(writer):
    writer.write(noise(2, 512, 512))
    kill_ffmpeg()
    with pytest.raises(errors.EncodingFailed, match="ffmpeg ended with -9"):
        writer.finish()


AFTER_THE_FRAMES = """
    if "pipe:0" in words:
        subprocess.run(real + words, check=True)
        until = time.monotonic() + {seconds}
        while time.monotonic() < until:
            {what}
        sys.exit()
"""


@pytest.mark.usefixtures("no_leaks")
@pytest.mark.parametrize("what", ["pass", "time.sleep(0.1); os.utime(words[-1])"])
def test_an_ffmpeg_that_computes_or_writes_is_waited_for(encode_slowly, what):
    assert len(encode_slowly(what, seconds=3.5)) > 1, "and its progress is told"


@pytest.mark.usefixtures("no_leaks")
def test_an_ffmpeg_that_does_nothing_is_an_encoding_failure(encode_slowly):
    with pytest.raises(errors.EncodingFailed, match="ffmpeg has done nothing for 1 s"):
        encode_slowly("time.sleep(0.1)", seconds=60)


@pytest.fixture
def encode_slowly(tmp_path, worker_settings, monkeypatch, ffmpeg_that):
    """When the writer heard of progress, of an ffmpeg that does so for so long at its end."""
    monkeypatch.setattr(video, "END_SECONDS", 1.2)
    monkeypatch.setattr(video, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(video, "LEAST_WORK_SECONDS", 0.1)

    def run(what, *, seconds):
        ffmpeg_that(AFTER_THE_FRAMES.format(what=what, seconds=seconds))
        heard = []
        with video.Mp4Writer(
            tmp_path / "video.mp4", width=64, height=64, fps=8, worker_settings=worker_settings
        ) as writer:
            writer.write(noise(2, 64, 64))
            writer.finish(on_progress=lambda: heard.append(time.monotonic()))
        return heard

    return run


@pytest.mark.usefixtures("no_leaks")
def test_the_words_of_ffmpeg_are_in_the_error(encode, tmp_path):
    with pytest.raises(errors.EncodingFailed, match="No such file or directory"):
        encode(noise(40, 512, 512), path=tmp_path / "no folder" / "video.mp4")


@pytest.mark.usefixtures("no_leaks")
def test_the_temporary_folder_may_be_full(encode, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/dev/null")
    assert video.probe(encode(noise(5, 64, 64))).num_frames == 5


@pytest.mark.usefixtures("no_leaks")
def test_many_words_of_ffmpeg_do_not_hold_it_up(encode, ffmpeg_that):
    ffmpeg_that("sys.stderr.write('word\\n' * 100_000)")
    assert video.probe(encode(noise(5, 64, 64))).num_frames == 5


@pytest.mark.usefixtures("no_leaks")
def test_a_full_disk_is_the_disks_failure(encode, tmp_path):
    path = tmp_path / "video.mp4"
    path.symlink_to("/dev/full")
    with pytest.raises(errors.DiskUnusable, match="No space left on device"):
        encode(noise(5, 64, 64), path=path)


def test_a_file_that_may_not_grow_further_is_the_disks_failure(tmp_path):
    """In a process of its own, for the limit holds for the whole process."""
    script = textwrap.dedent("""
        import resource, sys, torch
        from pathlib import Path
        from worker import errors, video
        from worker.settings import WorkerSettings
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        with video.Mp4Writer(
            Path(sys.argv[1]), width=256, height=256, fps=8, worker_settings=WorkerSettings()
        ) as writer:
            try:
                for _ in range(20):
                    writer.write(torch.randint(0, 256, (4, 256, 256, 3), dtype=torch.uint8))
                writer.finish()
            except errors.DiskUnusable:
                sys.exit(42)
    """)
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "video.mp4"], check=False)
    assert done.returncode == 42
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


@pytest.mark.usefixtures("no_leaks")
@pytest.mark.parametrize("what", ["no such file", "no libraries"])
def test_an_ffmpeg_that_encodes_nothing_is_a_fault_of_the_host(encode, monkeypatch, tmp_path, what):
    program = tmp_path / "ffmpeg"
    if what == "no libraries":
        program.write_text("#!/bin/sh\necho libx264.so: cannot open shared object >&2\nexit 127\n")
        program.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(program))
    with pytest.raises(errors.EncoderBroken, match=r"ffmpeg (does not start|ended with 127).*nor"):
        encode(noise(1, 16, 16))


@pytest.mark.timeout(60)
@pytest.mark.usefixtures("no_leaks")
def test_an_ffmpeg_that_hangs_is_given_up(encode, monkeypatch, tmp_path):
    program = tmp_path / "ffmpeg"
    program.write_text("#!/bin/sh\nexec sleep 600\n")
    program.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(program))
    for module, limit in ((video, "END"), (video, "PROBE"), (h264, "TRIAL")):
        monkeypatch.setattr(module, f"{limit}_SECONDS", 0.2)
    with pytest.raises(errors.EncoderBroken, match=r"has done nothing for 0 s; nor"):
        encode(noise(1, 16, 16))
    with pytest.raises(errors.EncoderBroken, match=r"cannot be checked.*timed out"):
        video.probe(tmp_path / "video.mp4")


@pytest.mark.usefixtures("no_leaks")
def test_whoever_leaves_in_mid_stream_leaves_no_ffmpeg_behind(tmp_path, worker_settings):
    writer = video.Mp4Writer(
        tmp_path / "video.mp4", width=512, height=512, fps=8, worker_settings=worker_settings
    )
    with contextlib.suppress(errors.AttemptCancelled), writer:
        writer.write(noise(4, 512, 512))
        raise errors.AttemptCancelled


@pytest.mark.usefixtures("no_leaks")
def test_a_finished_writer_leaves_nothing_behind(encode):
    assert encode(noise(5, 16, 16)).exists()


@pytest.fixture
def gpu_that_encodes(tmp_path, monkeypatch):
    """An ffmpeg that takes NVENC's words and lets x264 do it; the words that it was given.

    Not while there is a file `sessions used up` beside them.
    """
    told = tmp_path / "told"
    script = f"""\
        #!{sys.executable}
        import os, sys
        words = sys.argv[1:]
        with open({str(told)!r}, "a") as file:
            print(*words, file=file)
        if "h264_nvenc" in words:
            if os.path.exists({str(tmp_path / "sessions used up")!r}):
                sys.exit("[h264_nvenc @ 0x1] OpenEncodeSessionEx failed: out of memory (10)")
            start = words.index("h264_nvenc")
            words[start : start + (9 if "-cq" in words else 1)] = ["libx264"]
        os.execv({imageio_ffmpeg.get_ffmpeg_exe()!r}, ["ffmpeg", *words])
        """
    program = tmp_path / "ffmpeg"
    program.write_text(textwrap.dedent(script))
    program.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(program))
    return told


@pytest.mark.parametrize("wanted", ["nvenc", "auto"])
def test_a_gpu_that_encodes_is_used_where_it_is_wanted(
    tmp_path, worker_settings, gpu_that_encodes, wanted
):
    frames = noise(5, 160, 256)
    asked = worker_settings.model_copy(update={"encoder": wanted, "x264_crf": 21})
    with video.Mp4Writer(
        tmp_path / "video.mp4", width=256, height=160, fps=16, worker_settings=asked
    ) as writer:
        writer.write(frames)
        writer.finish()
        assert writer.encoder == "h264_nvenc"
    assert video.probe(tmp_path / "video.mp4").num_frames == 5
    assert "-c:v h264_nvenc -preset p5 -rc vbr -cq 21 -b:v 0" in gpu_that_encodes.read_text()


def test_x264_encodes_by_default_and_what_is_too_small_for_nvenc(worker_settings, gpu_that_encodes):
    auto = worker_settings.model_copy(update={"encoder": "auto"})
    assert h264.encoder(worker_settings, width=832, height=480) == "libx264"
    assert h264.encoder(auto, width=832, height=144) == "libx264"
    assert not gpu_that_encodes.exists(), "nothing was tried"


def test_an_encoder_that_is_not_there_is_told_or_passed_over(worker_settings):
    auto, nvenc = (
        worker_settings.model_copy(update={"encoder": wanted}) for wanted in ("auto", "nvenc")
    )
    if h264.why_no_nvenc(h264.ffmpeg()) is None:
        pytest.skip("this machine's GPU encodes")
    assert h264.encoder(auto, width=832, height=480) == "libx264"
    with pytest.raises(
        errors.EncoderBroken, match=r"RUSHES_ENCODER is nvenc.* auto would take x264"
    ):
        h264.encoder(nvenc, width=832, height=480)


@pytest.fixture
def encode_with(tmp_path, worker_settings):
    """`encode_with("auto")`: which encoder made a video."""

    def run(wanted):
        asked = worker_settings.model_copy(update={"encoder": wanted})
        with video.Mp4Writer(
            tmp_path / "video.mp4", width=256, height=256, fps=16, worker_settings=asked
        ) as writer:
            writer.write(noise(16, 256, 256))
            writer.finish()
        return writer.encoder

    return run


@pytest.mark.usefixtures("gpu_that_encodes")
def test_a_gpu_that_no_longer_encodes_is_a_fault_of_the_host_and_left_alone(encode_with, tmp_path):
    assert encode_with("auto") == "h264_nvenc"
    (tmp_path / "sessions used up").touch()
    with pytest.raises(errors.EncoderBroken, match="nor does h264_nvenc encode a test picture"):
        encode_with("auto")
    assert encode_with("auto") == "libx264"


@pytest.mark.usefixtures("gpu_that_encodes")
def test_a_gpu_that_must_encode_is_asked_again_for_each_video(encode_with, tmp_path):
    assert encode_with("nvenc") == "h264_nvenc"
    used_up = tmp_path / "sessions used up"
    used_up.touch()
    for _ in range(2):
        with pytest.raises(errors.EncoderBroken, match="OpenEncodeSessionEx failed"):
            encode_with("nvenc")
    used_up.unlink()
    assert encode_with("nvenc") == "h264_nvenc"


@pytest.mark.usefixtures("gpu_that_encodes")
def test_a_video_that_fails_on_a_gpu_that_encodes_is_an_encoding_failure(encode_with, tmp_path):
    (tmp_path / "video.mp4").mkdir()
    with pytest.raises(errors.EncodingFailed, match="Is a directory"):
        encode_with("auto")
    (tmp_path / "video.mp4").rmdir()
    assert encode_with("auto") == "h264_nvenc"


@pytest.mark.parametrize("crf", [0, 52])
def test_a_quality_that_players_do_not_play_is_refused(monkeypatch, crf):
    monkeypatch.setenv("RUSHES_X264_CRF", str(crf))
    with pytest.raises(jobs_errors.InvalidInput, match="RUSHES_X264_CRF"):
        settings.load()
