"""Follows neural collapse of a PyTorch network through its training, in one line of its loop.

    python examples/measure_your_model.py [WORKDIR]

Trains a small convolutional network with batch normalization and dropout on scikit-learn's digits
by cross-entropy with weight decay, measures the features after each block every two epochs, and
draws them: WORKDIR/figures/collapse_against_epoch.png (WORKDIR is runs/your_model by default).
The loop is any loop; `monitor.step()` is what makes it a measurement.
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn

import ncjax
from ncjax.cli import plot

EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 12, 64, 0.1, 5e-4


def block(channels_in, channels_out):
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    )


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.block1, self.block2, self.block3 = block(1, 8), block(8, 16), block(16, 32)
        self.pool, self.drop = nn.MaxPool2d(2), nn.Dropout(0.1)
        self.fc = nn.Linear(32, 10)

    def forward(self, x):
        x = self.block2(self.pool(self.block1(x)))
        return self.fc(self.drop(self.block3(x).mean((2, 3))))


def main(workdir):
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    data = torch.utils.data.TensorDataset(images, torch.tensor(labels))
    training = torch.utils.data.DataLoader(data, BATCH, shuffle=True)
    model = Net()
    optimizer = torch.optim.SGD(
        model.parameters(), LEARNING_RATE, momentum=0.9, weight_decay=WEIGHT_DECAY
    )
    monitor = ncjax.Monitor(
        model,
        torch.utils.data.DataLoader(data, 512),
        every=2,
        workdir=workdir,
        layers=["block1", "block2", "fc"],
        loss="cross_entropy",
        weight_decay=WEIGHT_DECAY,
    )
    for epoch in range(1, EPOCHS + 1):
        for x, y in training:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        monitor.step(epoch)
    print(ncjax.measure_model(model, training, loss="cross_entropy"))
    plot.main([str(workdir)])


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/your_model")
