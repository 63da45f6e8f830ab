import numpy as np
import pytest
import torch
from conftest import shaken, tiny_config

from mpp.models.classifier import Classifier, Head
from mpp.models.cnn import ResNet
from mpp.models.resnet_config import ResNetConfig
from mpp.models.vit import ViT
from mpp.objectives.labels import Classification
from mpp.objectives.labels_config import LabelsConfig


@pytest.mark.parametrize("hidden", [0, 6])
def test_a_head_starts_without_an_opinion(hidden):
    logits = Head(8, 5, hidden)(torch.randn(3, 8))
    assert torch.equal(logits, torch.zeros(3, 5))


@pytest.mark.parametrize("hidden", [0, 6])
def test_a_head_is_a_linear_map_perhaps_behind_a_tanh_layer(hidden):
    head, vectors = shaken(Head(8, 5, hidden)), torch.randn(3, 8)
    weights = {name: value.detach().double().numpy() for name, value in head.state_dict().items()}
    expected = vectors.double().numpy()
    if hidden:
        expected = np.tanh(expected @ weights["hidden.weight"].T + weights["hidden.bias"])
    expected = expected @ weights["linear.weight"].T + weights["linear.bias"]
    np.testing.assert_allclose(head(vectors).detach().numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("hidden", [0, 6])
def test_logits_are_float32_whatever_the_head_computes_in(hidden):
    head = shaken(Head(8, 5, hidden))
    exact, low = head(vectors := torch.randn(3, 8)), head.bfloat16()(vectors.bfloat16())
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, exact, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    "encoder", [ViT(tiny_config()), ResNet(ResNetConfig(image=(32, 48), depth=18, width=4, stem="small"))]
)
def test_a_classifier_is_the_head_on_the_encoders_vectors(encoder, batch):
    classifier = shaken(Classifier(encoder, Head(encoder.width, 3), ["a", "b", "c"])).eval()
    assert classifier.classes == ("a", "b", "c")
    vectors = encoder(batch.images).detach().numpy()
    expected = vectors @ classifier.head.linear.weight.detach().numpy().T + classifier.head.linear.bias.detach().numpy()
    np.testing.assert_allclose(classifier(batch.images).detach().numpy(), expected, rtol=1e-4, atol=1e-4)


def test_the_classifier_of_an_objective_is_what_was_trained(tiny_vit, batch):
    objective = Classification(tiny_vit, LabelsConfig(classes=("a", "b"), hidden=True))
    classifier = objective.classifier
    assert classifier.state_dict().keys() == objective.state_dict().keys()
    with torch.no_grad():
        objective.head.linear.bias.copy_(torch.tensor([1.0, 2.0]))
    assert torch.equal(classifier(batch.images), torch.tensor([[1.0, 2.0]]).expand(4, -1))
