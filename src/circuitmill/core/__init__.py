"""Pure tensor mathematics: encoders, decoders, nonlinearities, losses, initialisation, scaling and metrics."""
