"""Copies of a classifier: one only asked for logits and gradients to its input, one to train further."""

from __future__ import annotations

import copy

from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from untrojan.models.classifier import Classifier, Float32Conv2d


def frozen(model: Classifier, fold: bool = True) -> Classifier:
    """``model`` in evaluation mode with batch norm folded into the convolutions before it.

    The copy computes the same function to rounding, a sixth to a half faster. Networks that cannot be traced
    (a forward that branches on its input) are copied as they are, and all are without ``fold``: every module
    is then where it was.
    """
    _forget_histories(model)
    network = copy.deepcopy(model.network).eval().requires_grad_(False)
    copied = Classifier(
        _folded(network) if fold else network, model.num_classes, model.mean.flatten(), model.std.flatten(),
        model.architecture, model.precision, model.image_shape,
    ).to(model.device)  # fmt: skip
    return copied.eval().requires_grad_(False)


def trainable(model: Classifier) -> Classifier:
    """A copy of ``model`` to train further. Where every weight is frozen, those of the copy are not."""
    _forget_histories(model)
    copied = copy.deepcopy(model)
    if not any(parameter.requires_grad for parameter in copied.parameters()):
        copied.requires_grad_(True)
    return copied


def _forget_histories(model: Classifier) -> None:
    """What a hook computes anew at each call, as weight_norm does, cannot be copied with its history."""
    for module in model.network.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                setattr(module, name, value.detach())


def _folded(network: nn.Module) -> nn.Module:
    try:
        traced = fx.GraphModule(network, _Tracer().trace(network))
    except Exception:  # Whatever a user's own forward does when it meets a symbol in place of a tensor.
        return network
    modules = dict(traced.named_modules())
    for node in list(traced.graph.nodes):
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        norm, convolution = modules[str(node.target)], modules[str(before.target)]
        used_once = sum(other.target == before.target for other in traced.graph.nodes) == 1
        if used_once and _can_fold(convolution, norm):
            _replace(traced, str(before.target), fuse_conv_bn_eval(convolution, norm))
            node.replace_all_uses_with(before)
            traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced


def _can_fold(convolution: nn.Module, norm: nn.Module) -> bool:
    """Not where a hook or a parametrization would compute weights anew, or statistics are the batch's."""
    plain = type(convolution) in (nn.Conv2d, Float32Conv2d) and type(norm) is nn.BatchNorm2d
    hooked = any(each._forward_hooks or each._forward_pre_hooks for each in (convolution, norm))
    return plain and not hooked and getattr(norm, "running_mean", None) is not None


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Conv2d | nn.Linear) or super().is_leaf_module(m, module_qualified_name)


def _replace(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, module)
