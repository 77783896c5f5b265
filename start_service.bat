@echo off
rem Starts the service; makes the environment on the first run. Arguments go to server.py.
rem REICHAN_UNATTENDED=1: no waiting for a key after a failure.
setlocal
cd /d "%~dp0"
set PYTHONUTF8=1
rem The package comes last: with it, everything is there. What a broken-off first run left is gone on with.
rem -P: pip writes the package's name into this folder before it has installed anything.
.venv\Scripts\python.exe -P -c "import importlib.metadata as m; m.version('manga-upscale-service')" >nul 2>nul && goto start
.venv\Scripts\python.exe -c "import sys; sys.exit(sys.version_info < (3, 11))" >nul 2>nul && .venv\Scripts\python.exe -m ensurepip >nul 2>nul && goto ready

set PYTHON=py -3
py -3 -c "" >nul 2>nul || set PYTHON=python
%PYTHON% -c "import sys; sys.exit(sys.version_info < (3, 11))" || goto nopython
echo Making the environment in .venv; this takes a few minutes.
rem --clear: packages of a Python that is gone are not this one's.
%PYTHON% -m venv --clear .venv || goto failed
:ready
rem PyPI has only the CPU build for Windows; where an NVIDIA card answers, take the CUDA build.
nvidia-smi -L >nul 2>nul || goto package
rem Builds for CUDA 12.8 have no kernels for cards before the RTX 20 series (compute capability 7.5).
set CUDA=cu126
nvidia-smi --query-gpu=compute_cap --format=csv,noheader | findstr /r /c:"^7\.[5-9]" /c:"^[89]\." /c:"^[1-9][0-9]\." >nul && set CUDA=cu128
.venv\Scripts\python.exe -m pip install "torch>=2.10,<2.14" --index-url https://download.pytorch.org/whl/%CUDA% || goto failed
:package
.venv\Scripts\python.exe -m pip install -e . || goto failed

:start
.venv\Scripts\python.exe server.py %*
set STATUS=%errorlevel%
if not "%STATUS%"=="0" goto ended
exit /b 0

:nopython
echo Python 3.11 or newer is needed: https://www.python.org/downloads/windows/
set STATUS=1
goto ended
:failed
echo Setting up failed, see above. Start again to try once more.
set STATUS=1
:ended
rem Started by a double click, the window would close before anybody has read why.
if not defined REICHAN_UNATTENDED pause
exit /b %STATUS%
