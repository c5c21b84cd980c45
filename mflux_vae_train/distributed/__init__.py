"""Training in several processes, on one or more machines.

Both training commands run under MLX's launcher: `mlx.launch -n 2 -- mflux-vae train ...`, or
`mlx.launch --hostfile hosts.json -- $(which mflux-train-dreambooth) ...`.

An update is the same as with one process: micro-batches are distributed by index, and gradients, losses and batch
statistics are summed over all processes. 1, 2, 3 and 4 processes give the same weights within 1e-5 of each array's
norm. Exceptions: AdamW turns gradients that are zero except for rounding into steps (2e-5 in adapters after three
updates), and biases in front of a batch norm, which have no effect, drift. Class images, latents, previews and
validation are distributed, too. Only the first process writes files and logs.

Ends:

- SIGINT or SIGTERM to any process stops all after the update; the first process saves. The same command resumes, with
  any number of processes.
- An error or the loss of a process ends all: at once when the process is gone, after 40 seconds when its machine is.
  Each process keeps a TCP connection to the first for this, on a port that a firewall must let through.
- Processes whose settings, images or base weights differ are refused, with the difference.

Two Macs, by Thunderbolt or Ethernet:

1. Install the same versions of Python, MLX and this package at the same path on both. Enable remote login;
   `ssh mac2` must work without a password.
2. Copy the model's weights and the images to the same paths on both.
3. `mlx.distributed_config --verbose --hosts mac1,mac2 --over thunderbolt --backend ring --output-hostfile hosts.json`
   finds the cable and prints the commands that assign addresses (`--auto-setup` runs them).
4. `mlx.launch --verbose --hostfile hosts.json -- $(which mflux-train-dreambooth) --model dev ... --output_dir out`

MLX's other back ends (`--backend jaccl`, `nccl`, `mpi`) were never run here; the ring was, by TCP on one machine.

NVIDIA GPUs: MLX's launcher takes NCCL, with one GPU for each process, so `-n` is at most the number of GPUs. From MLX's
source: an error of NCCL ends its process at once, and a process that waits in a kernel for a lost one cannot be woken.
Nothing is saved then, and the same command goes on from the last checkpoint; see `--checkpointing_steps`.

Traffic of two processes per update (`python -m benchmarks.communication`): 0.26 GB for a LoRA of rank 16 of FLUX.1
(0.03 s by Thunderbolt 5, 0.2 s by 10 GbE, 2 s by 1 GbE at nominal rates), 23.8 GB for all weights.
"""
