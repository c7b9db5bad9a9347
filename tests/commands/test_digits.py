import pytest
import torch
from lightning import Trainer, seed_everything

from lightning_prune.commands.digits import DigitsData, DigitsNet, EpochShuffle, shifted


def trainer(**options):
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


@pytest.fixture(scope="module")
def data():
    module = DigitsData()
    module.setup("fit")
    return module


def parts(data):
    return {"train": data.train.tensors, "val": data.val.tensors, "test": data.test.tensors}


def test_split_has_every_image_once_in_sixty_twenty_twenty(data):
    images = {name: part[0] for name, part in parts(data).items()}
    assert {name: len(part) for name, part in images.items()} == {"train": 1077, "val": 360, "test": 360}
    everything = torch.cat(list(images.values())).flatten(1)
    assert len(everything.unique(dim=0)) == len(everything) == 1797


def test_split_holds_every_digit_in_the_same_proportion(data):
    shares = [labels.bincount(minlength=10) / len(labels) for _, labels in parts(data).values()]
    # Stratified parts differ by rounding: one image in 360 is 0.28 %. A random split differs by several percent.
    assert (shares[0] - shares[1]).abs().max() < 0.004
    assert (shares[0] - shares[2]).abs().max() < 0.004


def test_split_does_not_depend_on_the_seed_of_the_order_but_on_its_own(data):
    same, other = DigitsData(seed=7), DigitsData(split_seed=1)
    same.setup("fit")
    other.setup("fit")
    assert torch.equal(same.test.tensors[0], data.test.tensors[0])
    assert not torch.equal(other.test.tensors[1], data.test.tensors[1])


def test_images_are_normalised_by_the_training_part(data):
    images = data.train.tensors[0]
    assert images.shape[1:] == (1, 8, 8)
    assert images.mean().item() == pytest.approx(0, abs=1e-5)
    assert images.std().item() == pytest.approx(1, abs=1e-5)
    # Pixels are whole sixteenths, so two neighbouring values are 1 / 16 / std apart; 17 values in all.
    assert len(images.unique()) == 17


def test_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        sampler = EpochShuffle(50, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    torch.manual_seed(0)
    first = order(0, 3)
    torch.manual_seed(1)
    assert order(0, 3) == first
    assert sorted(first) == list(range(50))
    assert order(0, 4) != first
    assert order(1, 3) != first


def test_lightning_gives_each_epoch_another_order(data):
    seen = []

    class Watched(DigitsNet):
        def on_train_batch_start(self, batch, batch_idx):
            seen.append(batch[1])

    trainer(max_epochs=2, limit_train_batches=1, limit_val_batches=0).fit(Watched(width=2), DigitsData())
    assert len(seen) == 2
    assert not torch.equal(seen[0], seen[1])


def test_shifted_moves_each_image_by_its_own_offset_and_repeats_the_edge():
    image = torch.arange(9.0).view(1, 1, 3, 3)
    moved = shifted(image.expand(3, 2, 3, 3), torch.tensor([[0, 0], [1, 0], [0, -1]]))
    assert moved.shape == (3, 2, 3, 3)
    assert torch.equal(moved[0, 1], image[0, 0])
    assert moved[1, 0].tolist() == [[0, 1, 2], [0, 1, 2], [3, 4, 5]]
    assert moved[2, 1].tolist() == [[1, 2, 2], [4, 5, 5], [7, 8, 8]]


def test_only_training_batches_are_shifted_and_the_step_decides_how(data):
    module = DigitsData()
    module.trainer = trainer()
    batch = data.train[:64]
    assert module.on_after_batch_transfer(batch, 0)[0] is batch[0]
    module.trainer.training = True
    before = torch.get_rng_state()
    images, labels = module.on_after_batch_transfer(batch, 0)
    assert labels is batch[1]
    assert not torch.equal(images, batch[0])
    assert torch.equal(images, module.on_after_batch_transfer(batch, 0)[0])
    assert torch.equal(torch.get_rng_state(), before)
    module.shift = 0
    assert module.on_after_batch_transfer(batch, 0)[0] is batch[0]


def test_wrong_data_arguments_are_refused():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        DigitsData(batch_size=0)
    with pytest.raises(ValueError, match="from 0 to 7 pixels, as the images are 8 wide, got 8"):
        DigitsData(shift=8)


def test_net_has_the_parameters_its_docstring_names():
    # Stem 9w + 2w; stages 18w^2 + 4w, 54w^2 + 8w and 216w^2 + 16w for convolutions and norms of the main path,
    # shortcuts 2w^2 + 4w and 8w^2 + 8w; head 40w + 10. At w = 16: 298 * 256 + 91 * 16 + 10.
    assert sum(parameter.numel() for parameter in DigitsNet().parameters()) == 298 * 256 + 91 * 16 + 10


def test_net_maps_its_example_input_to_ten_logits():
    net = DigitsNet(width=4).eval()
    assert net(net.example_input_array).shape == (1, 10)


def test_learning_rate_rises_over_a_tenth_and_falls_to_nothing():
    rates = []

    class Watched(DigitsNet):
        def on_train_batch_start(self, batch, batch_idx):
            rates.append(self.optimizers().param_groups[0]["lr"])

    net = Watched(width=2, lr=0.5)
    trainer(max_epochs=6, limit_val_batches=0).fit(net, DigitsData(batch_size=128))
    # 1077 images make 9 batches of 128, so 54 steps: the first at 0.5 * 0.1, the peak near the fifth.
    assert len(rates) == 54
    assert rates[0] == pytest.approx(0.05)
    assert rates.index(max(rates)) in (4, 5, 6)
    assert max(rates) > 0.48
    assert rates[27] == pytest.approx(0.25)
    assert rates[-1] < 0.001


def test_checkpoint_reads_back_with_weights_only_and_its_arguments(tmp_path):
    fitting = trainer(max_epochs=1, limit_train_batches=2, limit_val_batches=1)
    fitting.fit(DigitsNet(width=3, lr=0.01), DigitsData())
    fitting.save_checkpoint(tmp_path / "digits.ckpt")
    again = DigitsNet.load_from_checkpoint(tmp_path / "digits.ckpt", weights_only=True)
    assert (again.hparams.width, again.lr) == (3, 0.01)
    assert torch.equal(again.stem.weight, fitting.lightning_module.stem.weight)


def test_net_logs_loss_and_accuracy_and_learns():
    seed_everything(0, verbose=False)
    net, data, fitting = DigitsNet(width=8), DigitsData(), trainer(max_epochs=3)
    fitting.fit(net, data)
    assert {"train/loss", "val/loss", "val/acc"} <= fitting.callback_metrics.keys()
    accuracy = fitting.test(net, data, verbose=False)[0]["test/acc"]
    assert accuracy > 0.9
    net.eval()
    images, labels = data.test.tensors
    assert accuracy == pytest.approx((net(images).argmax(1) == labels).float().mean().item(), abs=1e-6)


@pytest.mark.slow  # two full fits, a few seconds each
@pytest.mark.parametrize("seed", [0, 1])
def test_dense_net_reaches_ninety_seven_and_a_half_percent(seed):
    seed_everything(seed, verbose=False)
    net, data, fitting = DigitsNet(), DigitsData(seed=seed), trainer(max_epochs=15)
    fitting.fit(net, data)
    assert fitting.test(net, data, verbose=False)[0]["test/acc"] >= 0.975
