from micronet_eval.hookspecs import hookimpl


@hookimpl
def micronet_register_pruners(register):
    from micronet_spatial.pruner import Spatial

    register("spatial", Spatial)
