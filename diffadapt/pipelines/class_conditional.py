"""Images of given classes from a UNet2DModel in pixel space, with classifier-free guidance.

diffusers has no pipeline for a class-conditional UNet2DModel. This one has the usual folder layout
(`model_index.json`, `unet/`, `scheduler/`) and the call of `DiTPipeline`.
"""

import inspect
from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, SchedulerMixin, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from diffadapt.adapters.class_table import ClassTable, table_in_use


class ClassConditionalPipeline(DiffusionPipeline):
    """Generates images of classes 0, 1, ...

    Args:
        unet: a model with a class embedding (`num_class_embeds` rows).
        scheduler: any of diffusers, for epsilon, v or sample prediction.
        null_class: the row of the class table that stands for "no class", as a base learns it from dropped
            labels; None: the base has none, and guidance is not possible.

    Raises:
        ValueError: the model takes no classes, or its table has no row `null_class`.
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: UNet2DModel, scheduler: SchedulerMixin, null_class: int | None = None):
        super().__init__()
        rows = unet.config.num_class_embeds
        if rows is None:
            raise ValueError("the model has no class embedding (num_class_embeds), so it takes no classes")
        if null_class is not None and not 0 <= null_class < rows:
            raise ValueError(f"null_class {null_class} is no row of the class table; it has {rows}, from 0")
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(null_class=null_class)
        # Counted from the end, since an adapter's longer table keeps the null class there.
        self._null_from_end = None if null_class is None else rows - null_class

    @property
    def class_table(self) -> ClassTable:
        """The rows in use, the base's or an adapter's."""
        return table_in_use(self.unet, null_from_end=self._null_from_end)

    @property
    def null_class(self) -> int | None:
        """The row of the null class in use: that of the configuration until an adapter's table is longer."""
        return self.class_table.null_class

    @property
    def num_classes(self) -> int:
        """The number of classes, without the null class."""
        return len(self.class_table.labels)

    def save_pretrained(self, *arguments: object, **options: object) -> None:
        """As of any pipeline; the configuration names the null class of the table that is saved."""
        if self._null_from_end is not None:
            self.register_to_config(null_class=self.unet.class_embedding.num_embeddings - self._null_from_end)
        super().save_pretrained(*arguments, **options)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int],
        guidance_scale: float = 4.0,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """One image per label.

        Args:
            class_labels: the class of each image.
            guidance_scale: s in `uncond + s (cond - uncond)`; 1 or less is without guidance (Ho and
                Salimans 2022, arXiv 2207.12598, whose w is s - 1).
            num_inference_steps: denoising steps.
            generator: one for all images, or one per image, so that an image does not depend on its batch.
            output_type: "pil", "np" (B, H, W, 3) in [0, 1], or "pt" (B, 3, H, W) in [0, 1].
            return_dict: an `ImagePipelineOutput` instead of a tuple.

        Raises:
            ValueError: a label is no class, or there is guidance without a null class.
        """
        table = self.class_table
        labels = self._check_labels(class_labels, guidance_scale, table)
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (len(labels), self.unet.config.in_channels, height, width)
        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        noisy = randn_tensor(shape, generator, self._execution_device, self.unet.dtype)
        noisy = noisy * self.scheduler.init_noise_sigma  # (B, C, H, W); 1 but for schedules in sigmas
        step_options = self._step_options(generator)
        for timestep in self.progress_bar(self.scheduler.timesteps):
            scaled = self.scheduler.scale_model_input(noisy, timestep)
            predicted = self._predict_guided(scaled, timestep, labels, guidance_scale, table.null_class)
            noisy = self.scheduler.step(predicted, timestep, noisy, **step_options).prev_sample
        images = self._to_images(noisy, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _check_labels(
        self, class_labels: int | Sequence[int], guidance_scale: float, table: ClassTable
    ) -> Tensor:
        """The labels as a tensor (B,) on the device."""
        labels = [class_labels] if isinstance(class_labels, int) else [int(label) for label in class_labels]
        table.check(labels or [class_labels], "the base")  # an empty list is no class either
        if guidance_scale > 1 and table.null_class is None:
            raise ValueError("this base has no null class, so it cannot be guided; set guidance_scale to 1")
        return torch.tensor(labels, device=self._execution_device)

    def _predict_guided(
        self, noisy: Tensor, timestep: Tensor, labels: Tensor, guidance_scale: float, null_class: int | None
    ) -> Tensor:
        if guidance_scale <= 1:
            return self.unet(noisy, timestep, class_labels=labels, return_dict=False)[0]
        # both halves in one batch: s in eps_u + s (eps_c - eps_u)
        both_labels = torch.cat([labels, torch.full_like(labels, null_class)])  # (2 B,)
        both_noisy = torch.cat([noisy, noisy])  # (2 B, C, H, W)
        predicted = self.unet(both_noisy, timestep, class_labels=both_labels, return_dict=False)[0]
        conditional, unconditional = predicted.chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    def _step_options(self, generator: torch.Generator | list[torch.Generator] | None) -> dict:
        """The generators, for schedulers that add noise."""
        parameters = inspect.signature(self.scheduler.step).parameters
        return {"generator": generator} if "generator" in parameters else {}

    def _to_images(self, pixels: Tensor, output_type: str) -> object:
        images = (pixels.float() / 2 + 0.5).clamp(0, 1).cpu()  # (B, 3, H, W), from [-1, 1] to [0, 1]
        if output_type == "pt":
            return images
        images = images.permute(0, 2, 3, 1).numpy()
        return images if output_type == "np" else self.numpy_to_pil(images)
