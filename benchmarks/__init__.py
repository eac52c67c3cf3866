"""基准：`pdm run bench NAME`。"""
