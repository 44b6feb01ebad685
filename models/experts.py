"""Which of Wan2.2's two transformers computes a step."""

from torch import Tensor, nn


class ExpertSwitch:
    """The steps before `boundary_step_index` go to the network for high noise, the others to low.

    LightX2V's 4-step models switch at 2: steps 0 and 1, then 2 and 3. Called like a transformer,
    after `select(step)`.
    """

    def __init__(
        self, high_noise: nn.Module, low_noise: nn.Module, *, boundary_step_index: int
    ) -> None:
        if isinstance(boundary_step_index, bool) or not isinstance(boundary_step_index, int):
            raise ValueError(f"boundary_step_index must be an integer, got {boundary_step_index!r}")
        if boundary_step_index < 0:
            raise ValueError(f"boundary_step_index must not be negative, got {boundary_step_index}")
        self._experts = (high_noise, low_noise)
        self._boundary_step_index = boundary_step_index
        self._current: nn.Module | None = None

    def at(self, step: int) -> nn.Module:
        """The network of a step, counted from 0."""
        return self._experts[step >= self._boundary_step_index]

    def select(self, step: int, _num_steps: int = 0) -> None:
        """Fits `denoise(on_step=...)`."""
        self._current = self.at(step)

    def __call__(self, latents_BCTHW: Tensor, timestep_B: Tensor, context_BSG: Tensor) -> Tensor:
        assert self._current is not None, "select(step) comes first"
        velocity: Tensor = self._current(latents_BCTHW, timestep_B, context_BSG)
        return velocity
