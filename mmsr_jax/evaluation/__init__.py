"""What a policy is worth: accuracy, search ratio, reward, with errors that mean something."""
