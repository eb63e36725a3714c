"""The algorithm, and the making of a run: nothing here knows Ray, vLLM or DeepSpeed but `build`."""
