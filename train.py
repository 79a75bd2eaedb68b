"""Train, validate, test and predict: ``python train.py fit -c configs/classify/van_digits.yaml``."""

from visionattn_train import main

if __name__ == "__main__":
    main()
