"""bridge 用到的 Dagster 私有名字，只在这里导入：换了版本，要看的就是这一页。

每个名字在不在，由 test_dagster_internals 看守；怎样用它们，由 test_dagster_contract 看守。
"""

from __future__ import annotations

from dagster._core.definitions.job_base import InMemoryJob as InMemoryJob
from dagster._core.definitions.reconstruct import ReconstructableRepository as ReconstructableRepository
from dagster._core.definitions.reconstruct import (
    initialize_repository_def_from_pointer as initialize_repository_def_from_pointer,
)
from dagster._core.errors import DagsterRunAlreadyExists as DagsterRunAlreadyExists
from dagster._core.event_api import EventRecordsResult as EventRecordsResult
from dagster._core.events import ASSET_CHECK_EVENTS as ASSET_CHECK_EVENTS
from dagster._core.events import ASSET_EVENTS as ASSET_EVENTS
from dagster._core.events import EVENT_TYPE_TO_PIPELINE_RUN_STATUS as EVENT_TYPE_TO_PIPELINE_RUN_STATUS
from dagster._core.events import PIPELINE_EVENTS as PIPELINE_EVENTS
from dagster._core.execution import context_creation_job as context_creation_job
from dagster._core.execution.api import create_execution_plan as create_execution_plan
from dagster._core.execution.api import execute_run_iterator as execute_run_iterator
from dagster._core.instance.ref import InstanceRef as InstanceRef
from dagster._core.launcher import CheckRunHealthResult as CheckRunHealthResult
from dagster._core.launcher import LaunchRunContext as LaunchRunContext
from dagster._core.launcher import RunLauncher as RunLauncher
from dagster._core.launcher import WorkerStatus as WorkerStatus
from dagster._core.remote_origin import ManagedGrpcPythonEnvCodeLocationOrigin as ManagedGrpcPythonEnvCodeLocationOrigin
from dagster._core.remote_origin import RemoteRepositoryOrigin as RemoteRepositoryOrigin
from dagster._core.run_coordinator import RunCoordinator as RunCoordinator
from dagster._core.run_coordinator import SubmitRunContext as SubmitRunContext
from dagster._core.snap import ExecutionPlanSnapshot as ExecutionPlanSnapshot
from dagster._core.snap import snapshot_from_execution_plan as snapshot_from_execution_plan
from dagster._core.storage.dagster_run import FINISHED_STATUSES as FINISHED_STATUSES
from dagster._core.storage.event_log import AssetKeyTable as AssetKeyTable
from dagster._core.storage.event_log import SqlEventLogStorageTable as SqlEventLogStorageTable
from dagster._core.storage.event_log.base import AssetEntry as AssetEntry
from dagster._core.storage.event_log.base import AssetRecord as AssetRecord
from dagster._core.storage.event_log.migration import ASSET_KEY_INDEX_COLS as ASSET_KEY_INDEX_COLS
from dagster._core.storage.event_log.schema import AssetCheckExecutionsTable as AssetCheckExecutionsTable
from dagster._core.storage.runs.schema import RunsTable as RunsTable
from dagster._core.storage.runs.schema import RunTagsTable as RunTagsTable
from dagster._core.storage.runs.schema import SnapshotsTable as SnapshotsTable
from dagster._core.storage.tags import BACKFILL_ID_TAG as BACKFILL_ID_TAG
from dagster._core.storage.tags import PARENT_RUN_ID_TAG as PARENT_RUN_ID_TAG
from dagster._core.storage.tags import RETRY_NUMBER_TAG as RETRY_NUMBER_TAG
from dagster._core.storage.tags import ROOT_RUN_ID_TAG as ROOT_RUN_ID_TAG
from dagster._core.storage.tags import SCHEDULE_NAME_TAG as SCHEDULE_NAME_TAG
from dagster._core.storage.tags import SENSOR_NAME_TAG as SENSOR_NAME_TAG
from dagster._core.storage.tags import USER_TAG as USER_TAG
from dagster._core.types.loadable_target_origin import LoadableTargetOrigin as LoadableTargetOrigin
from dagster._serdes import ConfigurableClass as ConfigurableClass
from dagster._serdes import ConfigurableClassData as ConfigurableClassData
from dagster_postgres.utils import create_pg_engine as create_pg_engine
from dagster_postgres.utils import get_token_provider_from_config as get_token_provider_from_config
from dagster_postgres.utils import pg_url_from_config as pg_url_from_config
from dagster_shared.error import SerializableErrorInfo as SerializableErrorInfo
