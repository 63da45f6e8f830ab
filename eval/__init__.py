"""What an encoder is worth: frozen features and what can be read off them."""

if __name__ != "mpp.eval":
    raise ImportError("import mpp.eval, not eval: under two names every class here would exist twice")
