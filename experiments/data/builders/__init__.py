"""One file per data set, found by its name: a tensorflow-datasets builder called Builder that needs no TensorFlow."""
