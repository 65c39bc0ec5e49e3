"""Put the spectral-norm group and the adaptive hinge into a GAN that knows nothing of fastcifar.

The networks and the loop below are plain PyTorch. `--plain` runs them as they were; without it, the lines marked with
"fastcifar:" replace a line each.

    python examples/improve_your_gan.py --steps 400
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from fastcifar.nn import AdaptiveWeightedHinge, SpectralNormGroup

LATENT = 16


def networks() -> tuple[nn.Module, nn.Module]:
    """A generator and a discriminator of 8×8 grey images, with torch's spectral norm."""
    generator = nn.Sequential(
        nn.Linear(LATENT, 128), nn.ReLU(), nn.Unflatten(1, (32, 2, 2)),
        nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.ConvTranspose2d(16, 1, 4, 2, 1), nn.Tanh(),
    )  # fmt: skip
    discriminator = nn.Sequential(
        spectral_norm(nn.Conv2d(1, 16, 4, 2, 1)), nn.LeakyReLU(0.2),
        spectral_norm(nn.Conv2d(16, 32, 4, 2, 1)), nn.LeakyReLU(0.2),
        nn.Flatten(), spectral_norm(nn.Linear(128, 1)), nn.Flatten(0),
    )  # fmt: skip
    return generator, discriminator


def real_images(count: int) -> torch.Tensor:
    """Bright vertical or horizontal bars, [count, 1, 8, 8] in [−1, 1]."""
    places = torch.arange(8)
    bars = (places == torch.randint(8, (count, 1))).float()
    images = bars[:, None, :].expand(-1, 8, -1)
    images = torch.where(torch.rand(count, 1, 1) < 0.5, images, images.transpose(1, 2))
    return 2 * images[:, None] - 1


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--plain", action="store_true", help="as it was before fastcifar")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    generator, discriminator = networks()
    optimiser_g = torch.optim.Adam(generator.parameters(), 1e-3, betas=(0.0, 0.9))
    optimiser_d = torch.optim.Adam(discriminator.parameters(), 1e-3, betas=(0.0, 0.9))
    if not options.plain:
        group = SpectralNormGroup(discriminator)  # fastcifar: takes over torch's spectral norms, all at once
        hinge = AdaptiveWeightedHinge(discriminator.parameters())  # fastcifar: the weighted loss

    for number in range(options.steps):
        images, noise = real_images(64), torch.randn(64, LATENT)
        with torch.no_grad():
            fakes = generator(noise)
        optimiser_d.zero_grad()
        if options.plain:
            real, fake = discriminator(images), discriminator(fakes)
            loss = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
            loss.backward()
        else:
            group.step()  # fastcifar: u, v and σ advance once a step, not once a forward pass
            terms = hinge.backward(discriminator(images), discriminator(fakes))  # fastcifar: adds to .grad, weighted
            loss = (terms.loss_real + terms.loss_fake).detach()
        optimiser_d.step()

        optimiser_g.zero_grad()
        (-discriminator(generator(torch.randn(64, LATENT))).mean()).backward()
        optimiser_g.step()
        if number % max(1, options.steps // 5) == 0 or number == options.steps - 1:
            print(f"step {number + 1}: discriminator {loss.item():.3f}")

    with torch.no_grad():
        samples = generator.eval()(torch.randn(256, LATENT))
    # A bar is one bright line: of real images 8 of 64 pixels are bright.
    share = (samples > 0).float().mean().item()
    print(f"bright pixels: {100 * share:.1f} % of the samples', 12.5 % of the real ones'")
    return {"bright": share, "loss": loss.item()}


if __name__ == "__main__":
    main()
