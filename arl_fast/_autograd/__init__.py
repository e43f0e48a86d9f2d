"""The only files that know about autograd: the link, the loss, and the loss behind a linear head."""
