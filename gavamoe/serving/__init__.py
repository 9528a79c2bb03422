"""Ray Serve: the HTTP interface, the page, and the deployments behind them.

Only `deployments` and `launch` know Ray; all else runs, and is tested, in one process.

    api             the HTTP interface
    schema          its requests and responses, with every bound
    settings        arguments of the app builder
    keys            API keys: names, limits, expiry
    security        who may ask, bodies in time, headers
    proxy           before the replicas: HAProxy, and Ray Serve's own errors
    errors          every error as JSON
    routing         stage 1 as a service
    writing         stage 2 as a service
    catalog_search  looking for users and items; what a cluster is
    backend         what the interface stands on
    deployments     the Ray Serve deployments
    launch          the service on this machine; a new run into one that is up
    pages           the pages at / and /docs

Shape letters: N pairs, K clusters, I items, F distinct features.
"""
