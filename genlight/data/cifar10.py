"""CIFAR-10 in the Hugging Face parquet layout."""

from genlight.data.parquet import ParquetImageDataModule


class CIFAR10DataModule(ParquetImageDataModule):
    """60,000 colour photographs of 32x32 pixels in ten classes: 50,000 to train on, 10,000 held out.

    Local files: `plain_text/{train,test}-*.parquet` with columns `img` and `label`, below `root`, `root/cifar10`, or
    with `root` naming the folder of the files itself.

    Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
    """

    name = "cifar10"
    title = "CIFAR-10"
    folders = ("cifar10/plain_text", "plain_text", ".")
    image_column = "img"
    class_names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
