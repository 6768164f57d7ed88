"""One estimate of a gradient; `estimate` is the function to read first."""
