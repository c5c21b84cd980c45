"""Counterparts of commands, classes and configuration files of other VAE projects.

PyTorch-VAE and similar projects:

| other project | here |
|---|---|
| `python vae/train.py --experiment_name my_vae --num_epochs 100` | `mflux-vae train`, same flags |
| `--loss_type beta_vae --beta_end 4.0`, `--latent_dim --hidden_dims --learning_rate --batch_size` | same flags |
| `python vae/sample.py --num_samples 25 --grid_size 10 --latent_range_min -4` | `mflux-vae sample`, same flags |
| `get_default_config()`, `get_beta_vae_config()`, `VAETrainer(config).train()` | same, in `vae.config`, `vae.train` |
| `VAELoss`, `BetaVAELoss`, `DisentangledVAELoss` | same signatures, in `vae.losses.elbo` |
| `VAESampler(path)` and its methods | same, in `vae.sampler` |
| `VAE(in_channels, hidden_dims, latent_dim, image_size)` | `mflux_vae.networks.vector_latent.FlatAutoencoder` |
| `test_vae_model()`, `python test_setup.py` | `mflux-vae train --dry_run` |
| `EMA`, `save_checkpoint`, `create_optimizer`, `create_lr_scheduler` | `training.ema`, `checkpointing`, `optimizers` |
| `create_dataloader` | `vae.data.batches.open_data` |
| `set_seed`, `get_device`, `gradient_clip` | `--seed`, `--cpu`, `--max_grad_norm` |
| `compare_with_laq.py --vae --laq --image` | `mflux-vae compare VAE LAQ --image ...` |
| `train_ddp.py`, `train_single_gpu.py --config config_vae_sthv2.yaml` | `mflux-vae train --config`, file unchanged |
| `kld_weight`, `scheduler_gamma`, `check_val_every_n_epoch` | `--kld_weight`, `--lr_gamma`, `--val_every` |
| `save_every_n_steps`, `log_images_every_n_steps` | same flags |
| TensorBoard: losses, rates, reconstructions | `--tensorboard` (extra `tensorboard`) |

latent-diffusion:

| other project | here |
|---|---|
| `AutoEncoderKL(ddconfig, embed_dim, lossconfig, ckpt_path)`, `training_step`, `default_loss` | `latent_diffusion` |
| `python VAE/autoencoder.py`, `config.yaml` | `mflux-vae train --network_config config.yaml --reduction mean` |
| discriminator, perceptual loss | `--disc_start`, `--lpips WEIGHTS` |

MLX's example (mlx-examples/cvae):

| other project | here |
|---|---|
| `train.py --cpu --seed --batchsize --max_filters --epochs --lr` | `mflux-vae train --preset mlx-mnist`, same flags |
| `generate.py --model FILE.npz --latent_dims --outfile` | `mflux-vae sample`, same flags and file |
| `reconstruct.py --model --rec_testdata --outdir` | `mflux-vae reconstruct`, same flags |

`pytorch_vae_config` reads nested configuration files; `latent_diffusion` contains the class.
"""
