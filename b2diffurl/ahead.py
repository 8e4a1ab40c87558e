"""Making the next piece of work ready while the last one is used."""

import concurrent.futures


def ahead(make, items):
    """make(item) of every item, in order; one thread makes the next while the caller uses the last."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = None
        for item in items:
            following = pool.submit(make, item)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()
