"""`torch.compile(model, backend="zsmerge")`: Dynamo traces, our passes rewrite, the caller goes on calling the model.

    cache = zs.new_cache(model, config, batch_size)
    options = {"config": config, "cache": cache}
    fast = torch.compile(model, backend="zsmerge", options=options, fullgraph=True)
    with torch.inference_mode():
        out = fast(input_ids, attention_mask=mask, position_ids=positions, use_cache=False)    # a prompt
        out = fast(token, position_ids=cache.seen_tokens[:, None], use_cache=False)            # a token per row

`backend` is what Dynamo calls for every graph; `handed` turns Dynamo's graph into one the passes know; `call` runs the
result on the arguments of a call; `cache` is what all graphs of a model share.
"""
