"""Adam's and AdamW's state by parameter name, as tensors that a safetensors file can hold."""


def state_of(optimizer, named):
    """{"<name>.<key>": tensor} of the named parameters {name: parameter}; empty before the first step."""
    return {
        f"{name}.{key}": tensor
        for name, parameter in named.items()
        for key, tensor in optimizer.state.get(parameter, {}).items()
    }


def restore(optimizer, named, stored):
    """Put what state_of gave back; learning rate and betas stay the optimiser's own."""
    for name, parameter in named.items():
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if f"{name}.{key}" in stored:
                tensor = stored[f"{name}.{key}"]
                optimizer.state[parameter][key] = tensor if key == "step" else tensor.to(parameter.device)
