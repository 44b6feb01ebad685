"""Where weights are changes no number; two blocks at most are on the device; all come home."""

import pytest
import safetensors.torch
import torch

from models import checkpoint, layout, lora_switcher, memory, offload, quantized_files
from models.memory import Mode, Offload
from models.quantization import Scheme

CPU = torch.device("cpu")


def load(root, dtype=torch.bfloat16, **options):
    return checkpoint.load(layout.find(root, **options), device="cpu", dtype=dtype)


def weights(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


@torch.inference_mode()
def render(networks, placement=None):
    """Context, velocity and frames of fixed inputs."""
    torch.manual_seed(0)
    latents = torch.randn(1, 16, 2, 4, 4)
    using = placement.using if placement else lambda network: torch.inference_mode()
    with using(networks.text_encoder):
        context = networks.text_encoder.encode("a cat")
    with using(networks.transformer):
        velocity = networks.transformer(latents, torch.tensor([937.5]), context)
    with using(networks.vae):
        frames = torch.cat(list(networks.vae.decode_chunks(latents)), dim=2)
    return context, velocity, frames


@torch.inference_mode()
def velocity(networks, placement=None):
    """The transformer's part alone, of a few tokens."""
    torch.manual_seed(0)
    inputs = torch.randn(1, 16, 1, 2, 4), torch.tensor([937.5]), torch.randn(1, 512, 32)
    using = placement.using if placement else lambda network: torch.inference_mode()
    with using(networks.transformer):
        return networks.transformer(*inputs)


@pytest.mark.parametrize("on_cpu", [False, True])
@pytest.mark.parametrize("mode", Offload)
def test_every_mode_computes_the_same_numbers_again_and_again(native_root, mode, on_cpu):
    expected = render(load(native_root))
    networks = load(native_root)
    placement = offload.Placement(
        networks, mode=Mode(offload=mode, text_encoder_on_cpu=on_cpu), device=CPU
    )
    for _ in range(2):
        for ours, theirs in zip(render(networks, placement), expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("mode", Offload)
def test_names_ties_and_strides_of_weights_stay(native_root, mode):
    expected, networks = load(native_root), load(native_root)
    placement = offload.Placement(networks, mode=Mode(offload=mode), device=CPU)
    render(networks, placement)
    for part in ("transformer", "vae", "text_encoder"):
        ours, theirs = getattr(networks, part), getattr(expected, part)
        assert equal(weights(ours), weights(theirs))
        strides = [parameter.stride() for parameter in ours.parameters()]
        assert strides == [parameter.stride() for parameter in theirs.parameters()]
    encoder = networks.text_encoder.network
    assert encoder.shared.weight is encoder.encoder.embed_tokens.weight


def test_an_error_while_on_the_device_brings_the_weights_home(native_root):
    networks = load(native_root)
    expected = weights(networks.vae)
    placement = offload.Placement(networks, mode=Mode(offload=Offload.MODEL), device=CPU)
    home = networks.vae.conv1.weight.data_ptr()

    def fail():
        with placement.using(networks.vae):
            assert networks.vae.conv1.weight.data_ptr() != home
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert networks.vae.conv1.weight.data_ptr() == home
    assert equal(weights(networks.vae), expected)


def test_a_network_is_parked_in_stretches(native_root, monkeypatch):
    monkeypatch.setattr(memory, "STRETCH_BYTES", (20_000,))
    networks = load(native_root)
    expected = weights(networks.transformer)
    parked = offload.park(networks.transformer, CPU)
    assert len(parked) > 3
    assert equal(weights(networks.transformer), expected)
    total = sum(each.num_bytes for each in parked)
    exact = sum(tensor.nbytes for tensor in offload.weights_of(networks.transformer))
    assert exact <= total <= exact + offload.ALIGNMENT * len(expected)


class RecordingCopier(offload.DirectCopier):
    """Notes the order of things, and spoils a buffer that nobody computes in any more."""

    def __init__(self, network):
        self.events = []
        self.targets = {}
        for index, block in enumerate(network.blocks):
            block.register_forward_pre_hook(lambda *_, i=index: self.events.append(f"compute {i}"))

    def copy(self, slot, target, source):
        self.events.append(f"copy to {slot}")
        self.targets[slot] = target
        super().copy(slot, target, source)

    def wait(self, slot):
        self.events.append(f"wait for {slot}")

    def done(self, slot):
        self.events.append(f"done in {slot}")
        self.targets[slot].fill_(255)  # NaN in every float format


@pytest.fixture
def four_blocks(native_root, edit_json, edit_tensors):
    """The tiny model with four blocks."""

    def double(tensors):
        for name in [name for name in tensors if name.startswith("blocks.")]:
            _, number, rest = name.split(".", 2)
            tensors[f"blocks.{int(number) + 2}.{rest}"] = tensors[name].roll(1, 0).clone()

    edit_json(native_root / "config.json", num_layers=4)
    edit_tensors(native_root / "diffusion_pytorch_model.safetensors", double)
    return native_root


def test_the_next_block_is_copied_before_the_current_one_computes(four_blocks):
    expected = velocity(load(four_blocks))
    networks = load(four_blocks)
    copier = RecordingCopier(networks.transformer)
    offload.BlockStreamer(networks.transformer, CPU, copier=copier)
    for _ in range(2):
        copier.events.clear()
        assert torch.equal(velocity(networks), expected)
        order = [event for event in copier.events if not event.startswith("compute")]
        assert order == [
            "copy to 0",
            *("wait for 0", "copy to 1", "done in 0"),
            *("wait for 1", "copy to 0", "done in 1"),
            *("wait for 0", "copy to 1", "done in 0"),
            *("wait for 1", "done in 1"),
        ]


class LateCopier(offload.DirectCopier):
    """Copies at the last moment, as a slow bus would."""

    def __init__(self):
        self.asked = {}

    def copy(self, slot, target, source):
        self.asked[slot] = target, source
        target.fill_(255)

    def wait(self, slot):
        target, source = self.asked[slot]
        target.copy_(source)


def test_a_block_waits_for_its_own_copy_and_no_other(four_blocks):
    expected = velocity(load(four_blocks))
    networks = load(four_blocks)
    offload.BlockStreamer(networks.transformer, CPU, copier=LateCopier())
    for _ in range(2):
        assert torch.equal(velocity(networks), expected)


def test_a_block_computes_in_a_buffer_and_rests_at_home(four_blocks):
    network = load(four_blocks).transformer
    offload.BlockStreamer(network, CPU)
    at_home = [block.modulation.data_ptr() for block in network.blocks]
    seen = []
    for block in network.blocks:
        block.register_forward_pre_hook(lambda block, _: seen.append(block.modulation.data_ptr()))
    with torch.inference_mode():
        network(torch.randn(1, 16, 1, 2, 2), torch.tensor([1.0]), torch.randn(1, 512, 32))
    assert seen[0] == seen[2] != seen[1] == seen[3]
    assert not set(seen) & set(at_home)
    assert [block.modulation.data_ptr() for block in network.blocks] == at_home


def test_a_forward_that_was_broken_off_leaves_no_trace(four_blocks):
    networks = load(four_blocks)
    expected = velocity(networks)
    stored = weights(networks.transformer)
    copier = RecordingCopier(networks.transformer)
    offload.BlockStreamer(networks.transformer, CPU, copier=copier)

    def cancel(*_):
        raise KeyboardInterrupt

    hook = networks.transformer.blocks[2].cross_attn.register_forward_pre_hook(cancel)
    with pytest.raises(KeyboardInterrupt):
        velocity(networks)
    hook.remove()
    assert equal(weights(networks.transformer), stored)
    with torch.no_grad():  # a block that was fetched already is fetched again
        networks.transformer.blocks[3].modulation += 1
    changed = velocity(networks)
    assert not torch.equal(changed, expected)
    with torch.no_grad():
        networks.transformer.blocks[3].modulation -= 1
    networks.transformer.load_state_dict(stored)
    assert torch.equal(velocity(networks), expected)


def test_a_block_that_failed_and_the_next_one_take_what_is_changed_after(four_blocks):
    """As a LoRA that is switched for the job after one that failed."""
    whole, networks = load(four_blocks), load(four_blocks)
    offload.BlockStreamer(networks.transformer, CPU)

    def fail(*_):
        raise RuntimeError("a defect")

    hook = networks.transformer.blocks[0].cross_attn.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="a defect"):
        velocity(networks)
    hook.remove()
    for network in (whole.transformer, networks.transformer):
        with torch.no_grad():
            for block in network.blocks[:2]:
                block.modulation += 1
    assert torch.equal(velocity(networks), velocity(whole))


@pytest.mark.parametrize("mode", Offload)
def test_a_lora_is_switched_while_the_weights_are_at_home(native_root, tmp_path, mode):
    path = tmp_path / "style.safetensors"
    torch.manual_seed(0)
    prefix = "diffusion_model.blocks.1.ffn.0"
    tensors = {
        f"{prefix}.lora_down.weight": torch.randn(4, 64),
        f"{prefix}.lora_up.weight": torch.randn(128, 4),
        "diffusion_model.head.diff_m": torch.randn(1, 2, 64),
    }
    safetensors.torch.save_file(tensors, path)
    choices = [lora_switcher.Choice(path=path)]
    plain, networks = load(native_root), load(native_root)
    without = velocity(plain)
    lora_switcher.LoraSwitcher(plain.transformer).apply(choices)
    expected = velocity(plain)
    placement = offload.Placement(networks, mode=Mode(offload=mode), device=CPU)
    switcher = lora_switcher.LoraSwitcher(networks.transformer, device=CPU)
    for request, result in [(choices, expected), ([], without), (choices, expected)]:
        switcher.apply(request)
        assert torch.equal(velocity(networks, placement), result)
    assert not torch.equal(expected, without)


@pytest.mark.parametrize("mode", Offload)
def test_quantized_weights_travel_too(native_root, tmp_path, mode):
    target = tmp_path / "small.safetensors"
    quantized_files.write(layout.find(native_root), target, Scheme.FP8)
    networks = load(native_root, transformer_file=target)
    expected = velocity(networks)
    placement = offload.Placement(networks, mode=Mode(offload=mode), device=CPU)
    assert torch.equal(velocity(networks, placement), expected)
    assert networks.transformer.blocks[0].ffn[0].weight.dtype == torch.float8_e4m3fn


def test_blocks_take_what_was_said_beforehand(native_root):
    said = memory.needed(
        layout.find(native_root),
        num_frames=5,
        height=32,
        width=32,
        mode=Mode(offload=Offload.BLOCK),
    )
    streamer = offload.BlockStreamer(load(native_root).transformer, CPU)
    buffers = sum(buffer.nbytes for buffer in streamer._buffers)
    exact = said.stages["denoise"]["two blocks"]
    assert exact <= buffers <= exact + 2 * offload.ALIGNMENT * 40
