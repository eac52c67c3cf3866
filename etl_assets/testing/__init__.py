"""给写 ETL 的人的 pytest 夹具：在 conftest.py 里写 `pytest_plugins = ["etl_assets.testing.fixtures"]`。"""
