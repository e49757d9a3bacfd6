"""From scored trajectories to new weights: SFT and GRPO over one jitted update."""
