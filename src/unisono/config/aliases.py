"""Names that other trainers give to keys of a recipe, for the hint about an unknown key.

Owns the names only. None of them is accepted as a key: the same word means other things elsewhere.
"""

from __future__ import annotations

ALIASES = {
    name: key
    for key, names in {
        "train.samples_per_step": "batch_size batchsize train_batch_size per_device_train_batch_size global_batch_size "
        "per_device_batch_size micro_batch_size minibatch_size",
        "train.microbatches": "gradient_accumulation_steps accumulate_grad_batches accumulation_steps",
        "train.learning_rate": "lr rate base_lr max_lr peak_lr learning_rate_init",
        "train.epochs": "num_epochs num_train_epochs n_epochs max_epochs total_epochs",
        "train.max_steps": "num_steps num_train_steps total_steps max_iters max_iter iterations train_iters",
        "train.warmup": "warmup_steps warmup_ratio num_warmup_steps warmup_iters warmup_epochs warmup_proportion",
        "train.weight_decay": "wd l2 decay",
        "train.clip_norm": "max_grad_norm gradient_clip_val gradient_clip grad_clip clip_grad_norm clip_grad max_norm",
        "train.precision": "fp16 bf16 amp mixed_precision dtype torch_dtype half autocast",
        "train.loader_workers": "num_workers dataloader_num_workers num_loader_workers",
        "train.optimizer": "optim optimiser",
        "train.schedule": "scheduler lr_scheduler lr_scheduler_type lr_schedule",
        "train.beta1": "betas adam_beta1",
        "train.beta2": "adam_beta2",
        "train.epsilon": "eps adam_epsilon",
        "train.seed": "random_seed random_state manual_seed",
        "train.threads": "num_threads n_jobs",
        "train.device": "devices accelerator gpus use_cuda no_cuda use_cpu",
        "train.drop_last": "dataloader_drop_last",
        "train.label_smoothing": "label_smoothing_factor smoothing",
        "train.class_weights": "class_weight",
        "train.gradient_checkpointing": "activation_checkpointing",
        "encode.max_tokens": "max_length max_len max_seq_length max_seq_len model_max_length truncation",
        "encode.tokenizer": "tokenizer_name tokenizer_name_or_path",
        "model.folder": "model_name model_name_or_path pretrained_model_name_or_path checkpoint_path",
        "model.width": "hidden_size hidden_dim d_model embedding_dim embed_dim",
        "model.layers": "num_layers n_layers num_hidden_layers n_layer",
        "model.heads": "num_heads n_heads num_attention_heads n_head",
        "data.train": "train_file train_data train_path dataset dataset_name",
        "data.validation": "validation_file eval_file dev_file val",
        "data.test": "test_file",
        "data.validation_fraction": "validation_split val_split val_fraction validation_size",
        "data.test_fraction": "test_size test_split",
        "evaluate.every_steps": "eval_steps evaluation_steps eval_interval val_check_interval",
        "evaluate.patience": "early_stopping_patience early_stopping",
        "evaluate.metric": "metric_for_best_model monitor",
        "evaluate.keep_best": "load_best_model_at_end save_best save_best_only",
        "evaluate.samples_per_microbatch": "eval_batch_size per_device_eval_batch_size val_batch_size",
        "checkpoint.every_steps": "save_steps save_interval checkpoint_interval",
        "checkpoint.keep": "save_total_limit save_top_k max_to_keep",
        "tracking.loggers": "report_to logger log_with",
        "tracking.every_steps": "logging_steps log_interval log_every_n_steps log_every",
    }.items()
    for name in names.split()
}
"""A name elsewhere → the key of a recipe that comes closest."""
