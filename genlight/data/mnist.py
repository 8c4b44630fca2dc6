"""MNIST in the Hugging Face parquet layout."""

from genlight.data.parquet import ParquetImageDataModule


class MNISTDataModule(ParquetImageDataModule):
    """Handwritten digits of 28x28 grey pixels, in full from the hub or as many as the local files hold.

    Local files: `{train,test}-*.parquet` with columns `image` and `label`, below `root/mnist10k/mnist`, `root/mnist`,
    or with `root` naming the folder of the files itself.

    Source: Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits".
    """

    name = "mnist"
    title = "MNIST"
    folders = ("mnist10k/mnist", "mnist", ".")
    class_names = tuple("0123456789")
