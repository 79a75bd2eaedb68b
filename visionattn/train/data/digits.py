"""scikit-learn's handwritten digits: real images that need no download."""

import numpy as np
from PIL import Image
from timm.data import create_transform
from torchvision import transforms

from visionattn.train.data.base import Data


class DigitImages:
    """The 8x8 digits of one split, enlarged; white on black."""

    def __init__(self, images: np.ndarray, targets: np.ndarray, size: int, transform) -> None:
        grey = (images * (255 / 16)).round().astype(np.uint8)
        self.images = [Image.fromarray(g).resize((size, size), Image.Resampling.BICUBIC).convert("RGB") for g in grey]
        self.targets, self.transform = targets, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        return self.transform(self.images[index]), int(self.targets[index])


class Digits(Data):
    """1,797 handwritten digits from scikit-learn: 1,437 to train on, 360 to validate and test, always the same ones.

    Args:
        img_size: Side to which the 8x8 images are enlarged.
        batch_size: Images per step and process.
        eval_batch_size: The same for validation and test; ``batch_size`` if not given.
        num_workers: Processes that load images; the set is so small that 0 is fastest.
        rotate: Training images are rotated by up to this many degrees.
        shift: Training images are shifted by up to this share of their side.
        zoom: Training images are scaled by up to this share, up or down.
    """

    def __init__(
        self,
        img_size: int = 32,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        rotate: float = 10.0,
        shift: float = 0.1,
        zoom: float = 0.1,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers)
        self.num_classes = 10
        self.class_names = [str(digit) for digit in range(10)]
        self.img_size = img_size
        self.preprocess = dict(
            input_size=[3, img_size, img_size],
            interpolation="bicubic",
            mean=[0.5, 0.5, 0.5],
            std=[0.5, 0.5, 0.5],
            crop_pct=1.0,
            crop_mode="center",
        )
        # No mirror images and no crops: both turn digits into other shapes.
        self.affine = transforms.RandomAffine(
            rotate, (shift, shift), (1 - zoom, 1 + zoom), interpolation=transforms.InterpolationMode.BILINEAR
        )

    def dataset(self, split: str):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        parts = train_test_split(digits.images, digits.target, test_size=0.2, stratify=digits.target, random_state=0)
        train_images, val_images, train_targets, val_targets = parts
        transform = create_transform(**self.preprocess)
        if split == "train":
            transform = transforms.Compose([self.affine, transform])
            return DigitImages(train_images, train_targets, self.img_size, transform), "digit {}".format
        return DigitImages(val_images, val_targets, self.img_size, transform), "digit {}".format
