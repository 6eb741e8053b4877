"""Training adapters; the modules in the order in which a run uses them:

- options: `options`, `parsing`, `base_defaults`, `option_checks`, `adapter_options`
- preparation: `setup`, with `output_folder`, `trackers` and `push_to_hub`, which are tried before anything
  runs
- the step: `objective`, `param_groups`, `optimizers`, `ema`, `sharding`, `gradient_checks`, `loop`
- the run around the loop: `run`, with `memory`, `encoder_offload`, `signals` and `run_log`
- `checkpoint`: saving and resuming; `report`: images, metrics and the model card
"""
