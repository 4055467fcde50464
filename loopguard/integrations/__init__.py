"""How the controller holds a framework's model and optimizer: one file for each framework, loaded by name."""
